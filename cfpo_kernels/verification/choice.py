"""What ``backend="auto"`` takes: on a GPU the fastest kernels that a record says are right there.

By dtype and vocabulary size, never by the number of rows: scoring and training a token must give
the same bits.

A record once read by a process is not read again. Where there is none, the first eager call on a
device runs the short battery, once a machine.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
import warnings
from dataclasses import dataclass, field
from types import FrameType, ModuleType

import torch

from ..backends import cpu
from ..validation.values import is_debugging
from . import records
from .records import CRASHED, RIGHT, WRONG, VerifyRecord

REFERENCE = "reference"
MODES = ("once", "never", "always")
VERIFY = "python -m cfpo_kernels verify"


@dataclass
class Table:
    """What is known of one device.

    Attributes:
        record: what was found, or None.
        why: why plain torch runs where no kernels are right.
    """

    record: VerifyRecord | None = None
    why: str = ""
    chosen: dict[tuple[torch.dtype, int], str] = field(default_factory=dict)
    told: set[torch.dtype] = field(default_factory=set)

    def choose(self, dtype: torch.dtype, n_cols: int) -> str:
        key = (dtype, n_cols)
        if key not in self.chosen:
            self.chosen[key] = fastest(self.record, dtype, n_cols)
        return self.chosen[key]

    def reason(self, dtype: torch.dtype) -> str:
        """Why no kernels run for this dtype."""
        if self.record is None:
            return self.why
        name = str(dtype).removeprefix("torch.")
        found = [
            f"{v.kernels} is {v.verdict}" + (f" ({v.reason})" if v.reason else "")
            for v in self.record.verdicts
            if v.dtype in (name, "all") and v.verdict != RIGHT
        ]
        return "; ".join(found) or self.why or f"no kernels were verified for {name}"


_CPU = torch.device("cpu")
_lock = threading.RLock()
_tables: dict[torch.device, Table] = {}
_warned: set[str] = set()


def forget() -> None:
    """As in a new process; for tests."""
    _tables.clear()
    _warned.clear()
    asked.clear()


@functools.cache
def _targets() -> ModuleType:
    """It imports the backends, which import this; an import at each call takes its time."""
    from . import targets

    return targets


def kernels_for(
    device: torch.device, dtype: torch.dtype, n_cols: int, inplace: bool, compiling: bool
) -> str:
    """A name that ``backends.kernels`` takes, or "reference"."""
    kind = _targets().kind_of(device)
    if kind == "cpu":
        table = _tables.get(_CPU) or _cpu_table()
        if cpu.native is not None and (table.record is None or not _failed(table.record, dtype)):
            if dtype not in table.told:  # a call looks no further than that
                table.told.add(dtype)
                _tell(device, dtype, "cpu", f"{cpu.level()}; the CPU's kernels need no record")
            return "cpu"
    elif kind == "gpu":
        table = _gpu_table(device, compiling)
        chosen = table.choose(dtype, n_cols)
        if chosen != REFERENCE:
            if is_debugging():
                _tell(device, dtype, chosen, _why(table, dtype, n_cols), n_cols)
            return chosen
    else:
        table = Table(why=f"there are no kernels for {device.type} tensors")
    if is_debugging():
        _tell(device, dtype, REFERENCE, table.reason(dtype))
    if kind or (inplace and device.type != "meta"):  # which computes shapes
        without = "; inplace=True is not used" if inplace else ""
        warn(f"plain torch computes the loss on {device}{without}: {table.reason(dtype)}")
    return REFERENCE


def alternatives(device: torch.device, dtype: torch.dtype) -> set[str]:
    """What ``kernels_for`` might take of an eager call, if speed did not matter."""
    name, found = str(dtype).removeprefix("torch."), {REFERENCE}
    if _targets().kind_of(device) == "gpu" and (record := _gpu_table(device, False).record):
        found |= {v.kernels for v in record.verdicts if v.dtype == name and v.verdict == RIGHT}
    return found


def fastest(record: VerifyRecord | None, dtype: torch.dtype, n_cols: int) -> str:
    """Of the kernels that are right, the fastest at the nearest size that was measured; where
    nothing was measured, the first of ``targets.NAMES``."""
    from .timing import nearest

    if record is None:
        return REFERENCE
    name = str(dtype).removeprefix("torch.")
    right = [v.kernels for v in record.verdicts if v.dtype == name and v.verdict == RIGHT]
    if not right:
        return REFERENCE
    times = [t for t in record.timings if t.dtype == name and t.kernels in right]
    if times:
        size = nearest([t.n_cols for t in times], max(n_cols, 1))
        return min((t for t in times if t.n_cols == size), key=lambda t: t.ms).kernels
    return min(right, key=_preference)


def _preference(kernels: str) -> int:
    from . import targets

    names = [name for names in targets.NAMES.values() for name in names]
    return names.index(kernels) if kernels in names else len(names)


def _failed(record: VerifyRecord, dtype: torch.dtype) -> bool:
    return record.verdict("cpu", str(dtype).removeprefix("torch.")) in (WRONG, CRASHED)


def _cpu_table() -> Table:
    """The CPU's kernels are tested with every change: they run unless a record says no."""
    if _CPU not in _tables:
        if cpu.native is None:
            _tables[_CPU] = Table(why=cpu.import_failure)
        else:
            _tables[_CPU] = Table(records.load(records.identity_of(_CPU)))
    return _tables[_CPU]


def mode() -> str:
    """Of the variable CFPO_KERNELS_VERIFY."""
    value = os.environ.get("CFPO_KERNELS_VERIFY") or "once"
    if value not in MODES:
        raise ValueError(f"CFPO_KERNELS_VERIFY must be one of {', '.join(MODES)}, got {value!r}")
    return value


def _gpu_table(device: torch.device, compiling: bool) -> Table:
    if device.index is None and device.type != "cpu":
        device = torch.device(device.type, torch.get_device_module(device).current_device())
    found = _tables.get(device)
    if found is not None:
        return found
    with _lock:  # threads of one process
        if device not in _tables:
            table, stays = _first_use(device, compiling)
            if not stays:
                return table
            _tables[device] = table
        return _tables[device]


def _first_use(device: torch.device, compiling: bool) -> tuple[Table, bool]:
    """What is known of the device, and whether that stays so for this process."""
    from . import targets

    wanted = mode()
    identity = records.identity_of(device)
    if wanted != "always" and (known := records.load(identity)):
        return Table(known), True
    names = targets.names_for(device)
    why_not = {name: targets.why_not(name, device) for name in names}
    if all(why_not.values()):
        reasons = {targets.backend_of(name): why for name, why in why_not.items()}
        text = "; ".join(f"{name}: {why}" for name, why in reasons.items())
        return Table(why=f"no kernels can run on it ({text})"), True
    if wanted == "never":
        why = f"its kernels were not verified, and CFPO_KERNELS_VERIFY=never; run: {VERIFY}"
        return Table(why=why), True
    if compiling or _is_capturing(device):
        doing = "torch.compile traces" if compiling else "a CUDA graph is captured"
        why = f"its kernels cannot be verified while {doing}; before that, run: {VERIFY}"
        return Table(why=why), False
    return Table(_verify_once(device, identity, wanted)), True


def _verify_once(device: torch.device, identity: records.Identity, wanted: str) -> VerifyRecord:
    from . import run

    def say(line: str) -> None:
        print(f"cfpo_kernels: {line}", file=sys.stderr, flush=True)

    with records.lock(identity):
        # Another rank may have done it while this one waited.
        if wanted != "always" and (known := records.load(identity)):
            return known
        say(
            f"first use on {identity.device}: its kernels are verified now, at most "
            f"{run.time_limit(False):.0f} s, once for this build on this machine"
        )
        record = run.check(device, notice=say)
    for verdict in record.verdicts:
        reason = f": {verdict.reason}" if verdict.reason else ""
        say(f"{verdict.kernels}, {verdict.dtype}: {verdict.verdict}{reason}")
    return record


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and bool(torch.cuda.is_current_stream_capturing())


def _why(table: Table, dtype: torch.dtype, n_cols: int) -> str:
    """Why the kernels of ``fastest`` are those."""
    assert table.record is not None  # they are right by it
    name = str(dtype).removeprefix("torch.")
    times = [t for t in table.record.timings if t.dtype == name]
    if not times:
        return "right by the record, which has no times"
    from .timing import nearest

    size = nearest([t.n_cols for t in times], max(n_cols, 1))
    measured = ", ".join(f"{t.kernels} {t.ms:.3g} ms" for t in times if t.n_cols == size)
    return f"the fastest that is right by the record; at V = {size}: {measured}"


asked: set[tuple[str, str]] = set()  # names of backends and devices, which were told


def tell_asked(name: str, device: torch.device) -> None:
    """Of a backend that was asked for by name."""
    asked.add((name, device.type))
    level = f"{cpu.level()}; " if name == "cpu" else ""
    _tell(device, None, name, f"{level}backend={name!r} asks for it")


def _tell(
    device: torch.device, dtype: torch.dtype | None, chosen: str, why: str, n_cols: int = 0
) -> None:
    """With CFPO_KERNELS_DEBUG=1, once each: which kernels run, for whoever wonders on a rank."""
    if not is_debugging():
        return
    of = "logits" if dtype is None else f"{dtype} logits"
    columns = f", V = {n_cols}," if n_cols else ""
    line = f"cfpo_kernels: {chosen} for {of}{columns} on {device}: {why}"
    if line not in _warned:
        _warned.add(line)
        print(line, file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """Once each, as of whoever called this package."""
    if text not in _warned:
        _warned.add(text)
        warnings.warn(f"cfpo_kernels: {text}", UserWarning, stacklevel=_caller())


def _caller() -> int:
    """The stack level of the first caller outside of this package."""
    frame: FrameType | None = sys._getframe(1)
    level = 0
    while frame is not None and str(frame.f_globals.get("__name__", "")).startswith("cfpo_kernels"):
        frame = frame.f_back
        level += 1
    return level + 1
