"""The README's table "What is verified where", made from the records that ship with the package.

python tools/verified_table.py          # prints the table
python tools/verified_table.py --write  # puts it into README.md
"""

from __future__ import annotations

import sys
from pathlib import Path

from marked import with_part

from cfpo_kernels.verification import records, targets
from cfpo_kernels.verification.records import RIGHT, VerifyRecord

README = Path(__file__).resolve().parent.parent / "README.md"
NOT_YET = "**not yet verified on GPU**"

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
        "([what that shows](docs/verification.md#what-shows-what)); compiled for 8.0, 9.0, 10.0 "
        "and 12.0",
    ),
    (
        "triton",
        "NVIDIA sm_80 and newer, AMD gfx942",
        "tested on every commit, interpreted as Python and, for sm_90, as PTX; compiled for sm_75, "
        "sm_80, sm_90, sm_100 and gfx942",
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


def table(found: list[VerifyRecord]) -> str:
    """The table in Markdown."""
    lines = ["| backend | runs on | state |", "|---|---|---|"]
    for backend, runs_on, shown in ROWS:
        state = shown
        if backend in ("cuda", "triton"):
            devices = devices_of(backend, found)
            state = f"verified on {', '.join(devices)}" if devices else NOT_YET
            state += f"; {shown}"
        lines.append(f"| `{backend}` | {runs_on} | {state} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> None:
    made = table(records.shipped())
    if arguments == ["--write"]:
        README.write_text(with_part(README.read_text(), "verified", made))
    else:
        print(made, end="")


if __name__ == "__main__":
    main(sys.argv[1:])
