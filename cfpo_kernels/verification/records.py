"""What was found out about the kernels on a device, and where that is kept.

A record belongs to one build of the kernels on one kind of device under one driver, torch and
triton; it holds no host or user name. Records are read from the cache folder and, for devices that
were checked before a release, from the package.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import json
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..backends import cpu

FORMAT = 1
PACKAGE = Path(__file__).resolve().parent.parent
SHIPPED = Path(__file__).resolve().parent / "records"

RIGHT, WRONG, CRASHED, NOT_RUN = "right", "wrong", "crashed", "not run"
VERDICTS = (RIGHT, WRONG, CRASHED, NOT_RUN)


@dataclass(frozen=True)
class Identity:
    """What a verdict holds for."""

    package: str
    code: str  # of the kernels, and of the checks
    device: str
    capability: str  # "9.0"; of a CPU: the instruction set that is used
    driver: str
    torch: str
    triton: str

    def stem(self) -> str:
        """The name of its files."""
        device = re.sub(r"[^a-z0-9]+", "-", self.device.lower()).strip("-")[:40]
        digest = hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()
        return f"{device}-{digest[:12]}"

    def same_kernels(self, other: Identity) -> bool:
        """Whether `other`, of a record that ships with the package, speaks of these kernels on this
        device. Only Triton's kernels depend on Triton, and none on torch; the driver does not
        compile what this device's machine code was built for."""
        names = ("package", "code", "device", "capability", "triton")
        return all(getattr(self, name) == getattr(other, name) for name in names)


@dataclass
class Verdict:
    """What is known of a set of kernels for one dtype of logits."""

    kernels: str  # a name that backends.kernels takes
    dtype: str  # "bfloat16"
    verdict: str
    reason: str = ""
    cases: int = 0

    def is_kept(self) -> bool:
        """Whether it says something of the kernels, rather than of the moment."""
        return self.verdict in (RIGHT, WRONG, CRASHED)


@dataclass
class Timing:
    """Medians of one size, taken in turns with each other and with the copy."""

    kernels: str
    dtype: str
    n_rows: int
    n_cols: int
    ms: float  # loss and gradient, in place
    copy_ms: float  # of the same logits


@dataclass
class VerifyRecord:
    """The outcome of :func:`cfpo_kernels.verify`.

    Attributes:
        identity: package, hash of the kernels' code, device, capability, driver, torch, triton.
        full: whether it was the long battery.
        verdicts: one for each set of kernels and dtype: right, wrong, crashed or not run, and why.
        timings: of what is right.
        date: when, in UTC.
        seconds: how long it took.

    Example:
        >>> identity = Identity("0.1.0", "b69635d3", "NVIDIA H100", "9.0", "13.0", "2.13", "3.7.1")
        >>> busy = Verdict("cuda", "bfloat16", "not run", "the device is busy")
        >>> record = VerifyRecord(identity, verdicts=[busy])
        >>> record.exit_status(), record.verdict("cuda", "bfloat16")
        (2, 'not run')
    """

    identity: Identity
    full: bool = False
    verdicts: list[Verdict] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    date: str = ""
    seconds: float = 0.0

    def exit_status(self) -> int:
        """0: all right, or nothing to check; 1: something wrong or crashed; 2: could not run."""
        found = {verdict.verdict for verdict in self.verdicts}
        if found & {WRONG, CRASHED}:
            return 1
        return 2 if NOT_RUN in found else 0

    def verdict(self, kernels: str, dtype: str) -> str:
        """The verdict of one pair, "" if there is none."""
        return next(
            (v.verdict for v in self.verdicts if (v.kernels, v.dtype) == (kernels, dtype)), ""
        )

    def kept(self) -> VerifyRecord:
        """What goes to disk: nothing that only says that it was not a good moment."""
        verdicts = [verdict for verdict in self.verdicts if verdict.is_kept()]
        known = {(verdict.kernels, verdict.dtype) for verdict in verdicts}
        timings = [timing for timing in self.timings if (timing.kernels, timing.dtype) in known]
        return VerifyRecord(self.identity, self.full, verdicts, timings, self.date, self.seconds)

    def merged_into(self, older: VerifyRecord | None) -> VerifyRecord:
        """This record, with what `older` knows of other kernels and dtypes."""
        if older is None:
            return self
        known = {(verdict.kernels, verdict.dtype) for verdict in self.verdicts}
        verdicts = [v for v in older.verdicts if (v.kernels, v.dtype) not in known]
        timings = [t for t in older.timings if (t.kernels, t.dtype) not in known]
        return VerifyRecord(
            self.identity,
            self.full,
            [*verdicts, *self.verdicts],
            [*timings, *self.timings],
            self.date,
            self.seconds,
        )

    def as_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, values: Any) -> VerifyRecord:
        """Raises ValueError for anything but a whole record."""
        try:
            if values["format"] != FORMAT:
                raise ValueError(f"format {values['format']}, not {FORMAT}")
            record = cls(
                Identity(**values["identity"]),
                bool(values["full"]),
                [Verdict(**verdict) for verdict in values["verdicts"]],
                [Timing(**timing) for timing in values["timings"]],
                str(values["date"]),
                float(values["seconds"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"no record: {error!r}") from error
        if not all(isinstance(getattr(record.identity, f.name), str) for f in fields(Identity)):
            raise ValueError("no record: its identity is not text")
        if not all(verdict.verdict in VERDICTS for verdict in record.verdicts):
            raise ValueError("no record: an unknown verdict")
        return record


# --- Identities -----------------------------------------------------------------------------------


@functools.cache
def code_hash() -> str:
    """Of all that decides what the kernels compute and whether a check would see it."""
    digest = hashlib.sha256()
    digest.update(getattr(cpu.native, "build_id", "no native module").encode())
    for path in _sources():
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _sources() -> list[Path]:
    # Found, not imported: that would import Triton. Where nothing was installed there are none.
    spec = importlib.util.find_spec("cfpo_kernels.triton_kernels")
    folders = (spec.submodule_search_locations if spec else None) or []
    checks = ("battery", "calls", "cases", "compare")
    return [
        *(path for folder in folders for path in sorted(Path(folder).glob("*.py"))),
        *sorted((PACKAGE / "backends").glob("*.py")),
        *(PACKAGE / "verification" / f"{name}.py" for name in checks),
    ]


def version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


@functools.cache
def cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return "CPU"


def _driver(device: torch.device) -> str:
    """The CUDA version that the driver supports, such as "13000"; of other devices nothing."""
    if device.type != "cuda" or torch.version.hip is not None:
        return str(torch.version.hip or "")
    found = ctypes.c_int()
    with contextlib.suppress(OSError):
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(found))
    return str(found.value) if found.value else ""


def identity_of(device: torch.device) -> Identity:
    """Of this build on `device`."""
    if device.type == "cpu":
        level = os.environ.get("CFPO_KERNELS_CPU_LEVEL") or ""
        levels = cpu.native.cpu_levels() if cpu.native is not None else [""]
        name, capability = cpu_name(), level or levels[0]
    else:
        properties = torch.get_device_module(device).get_device_properties(device)
        name = properties.name
        major, minor = getattr(properties, "major", ""), getattr(properties, "minor", "")
        # torch for NVIDIA has this attribute too, and the device's name in it.
        architecture = getattr(properties, "gcnArchName", "") if torch.version.hip else ""
        capability = architecture or f"{major}.{minor}"
    return Identity(
        version_of("cfpo-kernels"),
        code_hash(),
        name,
        capability,
        _driver(device),
        torch.__version__,
        version_of("triton"),
    )


# --- The store ------------------------------------------------------------------------------------


def cache_folder() -> Path:
    if own := os.environ.get("CFPO_KERNELS_CACHE"):
        return Path(own)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "cfpo_kernels"
    return Path(os.path.expanduser("~")) / ".cache" / "cfpo_kernels"


def path_of(identity: Identity) -> Path:
    return cache_folder() / f"{identity.stem()}.json"


def read(path: Path) -> VerifyRecord | None:
    """The record in a file; None where there is none, or a broken one."""
    try:
        return VerifyRecord.from_json(json.loads(path.read_text()))
    except (OSError, ValueError):
        return None


def shipped() -> list[VerifyRecord]:
    return [record for path in sorted(SHIPPED.glob("*.json")) if (record := read(path)) is not None]


def load(identity: Identity) -> VerifyRecord | None:
    """What is known of these kernels on this device: found here, or before the release."""
    found = read(path_of(identity))
    if found is not None and found.identity == identity:
        return found
    return next((r for r in shipped() if identity.same_kernels(r.identity)), None)


def load_own(identity: Identity) -> VerifyRecord | None:
    found = read(path_of(identity))
    return found if found is not None and found.identity == identity else None


def store(record: VerifyRecord) -> Path:
    """Writes what is to be kept, beside what was known already; nobody ever reads half a file.

    Raises:
        OSError: the folder cannot be written to, or is full.
    """
    path = path_of(record.identity)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record.kept().merged_into(load_own(record.identity)).as_json(), indent=1)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        try:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(file.name)
            raise
    return path


@contextlib.contextmanager
def lock(identity: Identity) -> Iterator[None]:
    """Held by one process of a machine at a time. Where none can be had, everybody holds it."""
    file = None
    try:
        import fcntl

        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / f"{identity.stem()}.lock", "a")  # noqa: SIM115  # closed below
        fcntl.flock(file, fcntl.LOCK_EX)
    except (ImportError, OSError):
        pass
    try:
        yield
    finally:
        if file is not None:
            file.close()  # which lets go of it
