"""The README's table "What is verified where", made of records.

Those that ship with the package are of this version's kernels, those under bench/results/ of an
earlier version's.

python tools/verified_table.py          # prints the table
python tools/verified_table.py --write  # puts it into README.md
"""

from __future__ import annotations

import sys
from pathlib import Path

from marked import with_part

from cfpo_kernels.verification import records, targets
from cfpo_kernels.verification.records import RIGHT, VerifyRecord

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"
NOT_YET = "**not yet verified on GPU**"

# What was seen without a record.
SEEN = {
    "triton": "right in bfloat16 and float32 in the short battery on an H200, in an earlier version"
}

# (backend, what it runs on, what every commit shows of it)
ROWS = (
    (
        "cpu",
        "Linux, x86-64 with AVX-512, AVX2 or neither",
        "tested on every commit, at every instruction set that the machine has",
    ),
    ("cpu", "Linux, aarch64 (NEON)", "compiles; not run on hardware"),
    ("reference", "any torch device", "plain torch, tested on the CPU; for checking, for float64"),
    (
        "cuda",
        "NVIDIA GPUs from compute capability 8.0",
        "tested on every commit on the CPU, as source in emulation and as PTX in an interpreter "
        "([what that shows](docs/verification.md#what-shows-what)) and compiled for 8.0, 9.0, 10.0 "
        "and 12.0; wheels have more ([Build](#build))",
    ),
    (
        "triton",
        "NVIDIA sm_80 and newer, AMD gfx942",
        "tested on every commit, interpreted as Python and, for sm_90, as PTX; compiled for "
        "[eleven architectures](docs/triton.md#architectures)",
    ),
)


def devices_of(backend: str, found: list[VerifyRecord]) -> list[str]:
    """The GPUs for which a record says that some kernels of the backend are right."""
    names = [
        f"{record.identity.device} ({', '.join(dtypes)})"
        for record in found
        if (
            dtypes := sorted(
                {
                    v.dtype
                    for v in record.verdicts
                    if targets.backend_of(v.kernels) == backend and v.verdict == RIGHT
                }
            )
        )
    ]
    return sorted(set(names))


def earlier() -> list[VerifyRecord]:
    """What GPUs said of earlier versions."""
    found = (records.read(path) for path in sorted(RESULTS.glob("*-verify.json")))
    return [record for record in found if record is not None]


def state_on_gpus(backend: str, found: list[VerifyRecord], before: list[VerifyRecord]) -> str:
    here = devices_of(backend, found)
    once = [device for device in devices_of(backend, before) if device not in here]
    said = [f"verified on {', '.join(here)}"] if here else []
    said += [f"right on {', '.join(once)} in an earlier version"] if once else []
    return "; ".join(said) or SEEN.get(backend, NOT_YET)


def table(found: list[VerifyRecord], before: list[VerifyRecord]) -> str:
    """The table in Markdown, by records of this version's kernels and of those before it."""
    lines = ["| backend | runs on | state |", "|---|---|---|"]
    for backend, runs_on, shown in ROWS:
        state = shown
        if backend in ("cuda", "triton"):
            state = f"{state_on_gpus(backend, found, before)}; {shown}"
        lines.append(f"| `{backend}` | {runs_on} | {state} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> None:
    made = table(records.shipped(), earlier())
    if arguments == ["--write"]:
        README.write_text(with_part(README.read_text(), "verified", made))
    else:
        print(made, end="")


if __name__ == "__main__":
    main(sys.argv[1:])
