"""What the cluster kernel's machine code costs, read from the native module; needs no GPU.

Cycles are those of support/sass.py: by stall counts, scoreboards and its table of latencies.
"""

from __future__ import annotations

import importlib.util
import re
from typing import Any

import pytest
import sass
from ptx_tools import forms
from ptx_tools.nvcc import NVCC
from repository import ROOT

from cfpo_kernels.backends import cpu

spec = importlib.util.spec_from_file_location("cuda_resources", ROOT / "tools/cuda_resources.py")
assert spec is not None and spec.loader is not None
resources: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(resources)

# --- Snippets whose cost is known ---------------------------------------------------------------


def line(
    address: int,
    text: str,
    stall: int = 1,
    sets: int = 7,
    reads: int = 7,
    waits: int = 0,
) -> str:
    """As cuobjdump prints it; of the code only what has to do with scheduling."""
    control = stall | sets << 5 | reads << 8 | waits << 11
    return f"/*{address:04x}*/ {text} ; /* 0x0 */\n/* 0x{control << 41:016x} */\n"


def code(*lines: tuple[object, ...]) -> sass.Code:
    return sass.parse("".join(line(16 * i, *rest) for i, rest in enumerate(lines)))  # type: ignore[arg-type]


BACK = ("@P0 BRA 0x0", 5)
END = ("EXIT",)


def around(*lines: tuple[object, ...]) -> float:
    snippet = code(*lines, BACK, END)
    return sass.cycles_around(snippet, sass.loops_around(snippet, "BRA")[0])


JUMP = 5 + sass.TAKEN


def test_stall_counts_add_up() -> None:
    assert around(("DFMA R0, R0, R0, R0", 8), ("DADD R2, R0, R0", 8)) == 16 + JUMP


def test_a_result_is_waited_for() -> None:
    load, use = ("LDS R0, [R2]", 1, 0), ("FADD R1, R0, R0", 4, 7, 7, 0b1)
    other = ("FADD R5, R5, R5", 10)
    assert around(load, use) == sass.LATENCIES["LDS"] + 4 + JUMP
    assert around(load, other, use) == sass.LATENCIES["LDS"] + 4 + JUMP, "meanwhile"
    assert around(load, *[other] * 9, use) == 1 + 90 + 4 + JUMP, "nothing is left to wait for"
    # In the loop before it was asked for.
    assert around(use, load) == sass.LATENCIES["LDS"] + 4
    assert around(use, load, *[other] * 9) == 4 + 1 + 90 + JUMP
    store = ("STS [R2], R0", 1, 7, 2)
    overwrite = ("MOV R0, R1", 4, 7, 7, 0b100)
    assert around(store, overwrite) == sass.OPERANDS_READ + 4 + JUMP
    assert around(("MUFU.RCP64H R1, R1", 1, 3), ("DEPBAR.LE SB3, 0x0", 2)) == 30 + 2 + JUMP


def test_the_longest_path_is_taken() -> None:
    short, long = ("FADD R0, R0, R0", 4), ("DADD R0, R0, R0", 8)
    # 0 BRA 3; 1 long; 2 BRA 4; 3 short; 4 ...
    both = (("@P1 BRA P2, 0x30", 5), long, ("BRA 0x40", 5), short, ("NOP", 1))
    assert around(*both) == 5 + 8 + 5 + sass.TAKEN + 1 + JUMP
    snippet = code(*both, BACK, END)
    loop = sass.loops_around(snippet, "NOP")[0]
    assert sass.cycles_around(snippet, loop, avoid="DADD") == 5 + sass.TAKEN + 4 + 1 + JUMP
    assert [snippet[a].opcode for a in sass.fewest_around(snippet, loop)] == [
        "BRA", "FADD", "NOP", "BRA",
    ]  # fmt: skip
    assert sass.cycles_along(snippet, sass.fewest_around(snippet, loop)) == 5 + 8 + 4 + 1 + JUMP
    # Divisions by what is no normal number are on no path, nor what lanes do that are apart.
    assert around(("@P1 BRA 0x20", 5), ("CALL.REL.NOINC 0x70", 5), short) == 5 + 8 + 4 + JUMP
    assert around(("BRA.DIV UR4, 0x20", 5), short, short) == 5 + 4 + 4 + JUMP


def test_loops_are_found() -> None:
    snippet = code(
        ("NOP",), ("LDS R0, [R1]",), ("@P0 BRA 0x10", 5), ("STS [R1], R0",), ("@P1 BRA 0x0", 5), END
    )
    outer, inner = sass.loops_around(snippet, "LDS")
    assert (outer, inner) == ({0, 0x10, 0x20, 0x30, 0x40}, {0x10, 0x20})
    assert sass.loops_around(snippet, "STS") == [outer]
    assert (sass.head(snippet, outer), sass.head(snippet, inner)) == (0, 0x10)
    with pytest.raises(AssertionError, match="in no loop"):
        sass.loops_around(snippet, "EXIT")


def test_jumps_through_a_table() -> None:
    """They go wherever nothing else does."""
    snippet = code(
        ("BRX R4 -0x20", 5),
        ("DADD R0, R0, R0", 8),
        ("BRA 0x40", 5),
        ("FADD R0, R0, R0", 4),
        BACK,
        END,
    )
    assert set(snippet[0].targets) == {0x10, 0x30}
    loop = sass.loops_around(snippet, "FADD|DADD")[0]
    assert loop == {0, 0x10, 0x20, 0x30, 0x40}


def test_what_comes_before() -> None:
    load, fence, tell = "LDS R0, [R1]", "FENCE.VIEW.ASYNC.S", "SYNCS.ARRIVE.TRANS64.RED.A1T0 R1"
    fenced = code((load,), ("@P0 BRA 0x20", 5), (fence,), (tell,), BACK, END)
    assert unfenced(fenced) == []
    around_it = code((load,), ("@P0 BRA 0x30", 5), (fence,), (tell,), BACK, END)
    assert unfenced(around_it) == [0x30]
    assert unfenced(code((fence,), (load,), (tell,), BACK, END)) == [0x20]


# --- The cluster kernel -------------------------------------------------------------------------

TELLS = r"SYNCS\.ARRIVE\..*A1T0"  # the other blocks, that their messages may come
ACCOUNTANTS = 2
MOST_CYCLES = 2000  # of all accountants together for a row
# Of a worker, for each element: 32 of a lane in a segment, 8 in a vector that is written.
MOST_FOR_SUMS, MOST_FOR_GRADIENT = 7.7, 6.5


def unfenced(kernel: sass.Code) -> list[int]:
    """Where others are told on a path on which nothing was fenced since the last load."""
    loads = sass.places(kernel, "LDS")
    return sorted(
        set(sass.places(kernel, TELLS)) & sass.reachable(kernel, loads, r"FENCE\.VIEW\.ASYNC")
    )


def accountant_cycles(kernel: sass.Code, accountants: int = ACCOUNTANTS) -> float:
    """For a row; without the look at 32 later rows at once, which a ballot ends."""
    return sass.cycles_around(kernel, sass.loops_around(kernel, TELLS)[0], "VOTE") / accountants


def instructions_an_element(kernel: sass.Code) -> tuple[float, float]:
    """Of rows that are aligned, away from the target and the row's ends."""
    counts = []
    rows = sass.loops_around(kernel, "STAS")[0]
    for opcode in ("STAS", r"STS\.128"):
        path = sass.fewest_around(kernel, sass.loops_around(kernel, opcode, rows)[-1])
        exponentials = len(sass.places(kernel, r"MUFU\.EX2", path))
        assert exponentials % 8 == 0 and exponentials > 0
        counts.append(len(path) / exponentials)
    return counts[0], counts[1]


def problems(kernel: sass.Code, accountants: int = ACCOUNTANTS) -> list[str]:
    found = []
    if (cycles := accountant_cycles(kernel, accountants)) > MOST_CYCLES:
        found.append(f"the accountants take {cycles:.0f} cycles a row")
    for count, most in zip(
        instructions_an_element(kernel), (MOST_FOR_SUMS, MOST_FOR_GRADIENT), strict=True
    ):
        if count > most:
            found.append(f"a worker takes {count:.1f} instructions an element, not {most}")
    loops = [sass.loops_around(kernel, opcode)[0] for opcode in (TELLS, "STAS")]
    if any(sass.places(kernel, r"MEMBAR\.(ALL|SC)\.(GPU|SYS)", loop) for loop in loops):
        found.append("a fence of the whole GPU for each row")
    if unfenced(kernel):
        found.append("others are told without a fence")
    return found


@pytest.fixture(scope="module")
def kernels() -> dict[str, sass.Code]:
    """That of bfloat16 without an entropy, by architecture."""
    if cpu.native is None or not cpu.native.cuda_built or resources.find_cuobjdump() is None:
        pytest.skip("needs the module's CUDA part, and cuobjdump")
    found = {
        usage.arch: sass.disassemble(
            resources.find_cuobjdump(), cpu.native.__file__, usage.function, usage.arch
        )
        for usage in resources.usages(cpu.native.__file__)
        if usage.kernel == "cluster_kernel<bfloat16, policy>"
        and usage.arch in ("sm_90a", "sm_100f")
    }
    if not found:
        pytest.skip("built for neither 9.0a nor 10.0f")
    return found


def test_the_budget_of_a_row(kernels: dict[str, sass.Code]) -> None:
    for arch, kernel in kernels.items():
        assert problems(kernel) == [], arch
        assert len(problems(kernel, accountants=1)) == 1, "one alone would take too long"


def test_what_the_documentation_says_of_it(kernels: dict[str, sass.Code]) -> None:
    """By the compiler whose registers it has as well."""
    text = (ROOT / "docs" / "cuda.md").read_text()
    rows = re.findall(r"^\| `?(sm_\w+)`? \| (\d+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.M)
    assert {arch for arch, *_ in rows} >= kernels.keys()
    if NVCC is None or forms.version() != "13.0.88":
        pytest.skip("the figures are nvcc 13.0.88's")
    for arch, cycles, *counts in rows:
        if arch in kernels:
            assert round(accountant_cycles(kernels[arch])) == int(cycles)
            got = [round(count, 1) for count in instructions_an_element(kernels[arch])]
            assert got == [float(count) for count in counts]
