"""Runs single instructions; as a program, `python -m ptx_tools.single LIBRARY`, all of them.

That program needs nothing but Python, so that a library built with sanitizers runs in it.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable
from pathlib import Path

from .interpreter import Module, pack, text_of
from .kernel_cases import KERNELS, check_kernel
from .mistake_cases import MISTAKES, check_mistake
from .register_cases import CASES, Case, bits

GARBAGE = 0xA5A5A5A5A5A5A5A5


def statement(case: Case) -> str:
    """Results in %a1, %a2; operands from %a10 on."""
    opcode, shape = case.form.split()
    results = [f"%a{i + 1}" for i in range(len(case.results))]
    operands = [f"%a{i + 10}" for i in range(len(case.operands))]
    written = []
    names = results + operands
    for letter in shape:
        n = int(letter) if letter.isdigit() else 2 if letter == "p" else 1
        taken, names = names[:n], names[n:]
        several = "|".join(taken) if letter == "p" else "{" + ", ".join(taken) + "}"
        written.append(taken[0] if n == 1 else several)
    return f"{opcode} {', '.join(written)};\n"


def body_of(case: Case) -> str:
    body = "ld.param.u64 %a0, [p0];\n"
    for i in range(len(case.operands)):
        body += f"ld.global.u64 %a{i + 10}, [%a0+{8 * i}];\n"
    body += statement(case)
    for i in range(len(case.results)):
        body += f"st.global.u64 [%a0+{32 + 8 * i}], %a{i + 1};\n"
    return body


def width_of(kind: str) -> int:
    return 1 if kind == "pred" else int(kind[1:])


def run(library: Path, case: Case) -> list[int]:
    """The results' bits."""
    memory = (ctypes.c_uint64 * 8)()
    for i, (kind, value) in enumerate(case.operands):
        memory[i] = bits(kind, value) | GARBAGE >> width_of(kind) << width_of(kind)
    at = ctypes.addressof(memory)
    Module(library, text_of(body_of(case))).launch(
        "small", (1,), (1,), pack(("q", at)), memory=[(at, 64, True)], exact_if_exact=True
    )
    return [memory[4 + i] & ((1 << width_of(kind)) - 1) for i, (kind, _) in enumerate(case.results)]


def is_right(library: Path, case: Case) -> bool:
    got = run(library, case)
    return got == [bits(kind, value) for kind, value in case.results]


def wrong_ones(library: Path, cases: Iterable[Case]) -> list[str]:
    return [
        f"{case}: got {[hex(x) for x in run(library, case)]}"
        for case in cases
        if not is_right(library, case)
    ]


def main(library: Path) -> None:
    wrong = wrong_ones(library, CASES)
    for name in KERNELS:
        check_kernel(library, name)
    for name in MISTAKES:
        check_mistake(library, name)
    print(f"{len(CASES)} + {len(KERNELS)} + {len(MISTAKES)} cases, {len(wrong)} wrong", *wrong)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
