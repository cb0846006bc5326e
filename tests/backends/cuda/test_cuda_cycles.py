"""What the clusters' machine code costs, read from the native module; needs no GPU.

Cycles are those of support/sass.py: by stall counts, scoreboards and its table of latencies.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Collection
from typing import Any, NamedTuple

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


def test_several_tables_lead_to_all_places() -> None:
    jump, other = ("BRX R4 -0x20", 5), ("FADD R0, R0, R0", 4)
    snippet = code(jump, ("BRA 0x40", 5), other, jump, ("BRA 0x0", 5), other, END)
    assert snippet[0].targets == snippet[0x30].targets == (0x10, 0x20, 0x50)


def test_loops_within_a_loop() -> None:
    """Those that lead back, without what a loop passes by."""
    add = ("FADD R0, R0, R0", 4)
    load, twice, once = ("LDS R0, [R1]", 1, 0), ("@P1 BRA 0x10", 5), ("@P2 BRA 0x40", 5)
    snippet = code(add, load, add, twice, add, once, BACK, END)
    loop = sass.loops_around(snippet, "LDS")[0]
    assert sass.loops_within(snippet, loop) == [{0x10, 0x20, 0x30}, {0x40, 0x50}]
    assert sass.innermost_loops(snippet, "LDS|FADD") == [loop, {0x10, 0x20, 0x30}, {0x40, 0x50}]


def test_the_shortest_path_by_some_places() -> None:
    add, store = ("FADD R0, R0, R0", 4), ("STG [R2], R0", 1)
    # Two stores, each of which a branch may leave out.
    snippet = code(("@P1 BRA 0x20", 5), store, ("@P2 BRA 0x50", 5), store, add, add, BACK, END)
    loop = sass.loops_around(snippet, "FADD")[-1]
    assert sass.fewest_around(snippet, loop) == [0, 0x20, 0x50, 0x60]
    stores = sass.places(snippet, "STG")
    assert sass.fewest_around(snippet, loop, stores) == [0, 0x10, 0x20, 0x30, 0x40, 0x50, 0x60]
    with pytest.raises(AssertionError, match="no way"):
        sass.fewest_around(snippet, loop, stores[::-1])


def test_loops_that_merge_are_counted_by_their_loads() -> None:
    """One load a lane and time around: 32 segments."""
    load, tell = ("LDS R0, [R1]", 10), ("SYNCS.ARRIVE.TRANS64.RED.A1T0 R1", 4)
    for loads in (1, 5):
        snippet = code(
            ("NOP", 1), *[load] * loads, ("@P1 BRA 0x10", 5), tell, ("@P0 BRA 0x0", 5), END
        )
        one = 1 + 10 * loads + 5 + 4 + JUMP
        assert accountant_cycles(snippet, 32 * loads, 1) == one
        assert accountant_cycles(snippet, 32 * loads + 1, 1) == one + 10 * loads + JUMP
        assert accountant_cycles(snippet, 64 * loads, 2) == (one + 10 * loads + JUMP) / 2


def test_what_comes_before() -> None:
    load, fence, tell = "LDS R0, [R1]", "FENCE.VIEW.ASYNC.S", "SYNCS.ARRIVE.TRANS64.RED.A1T0 R1"
    fenced = code((load,), ("@P0 BRA 0x20", 5), (fence,), (tell,), BACK, END)
    assert unfenced(fenced) == []
    around_it = code((load,), ("@P0 BRA 0x30", 5), (fence,), (tell,), BACK, END)
    assert unfenced(around_it) == [0x30]
    assert unfenced(code((fence,), (load,), (tell,), BACK, END)) == [0x20]


# --- The kernels for clusters ---------------------------------------------------------------------

TELLS = r"SYNCS\.ARRIVE\..*A1T0"  # the other blocks, that their messages may come
EXPONENTIAL = r"MUFU\.EX2"
ACCOUNTANTS = 2
USUAL = 160  # segments, more than of 151,936 16-bit logits


class Cost(NamedTuple):
    """Of a worker instructions for each element, with rows that are aligned, away from the target
    and the row's ends; of all accountants together cycles for a row, 0 where there are none."""

    usual: float
    longest: float  # of the longest row that is foreseen
    sums: float
    gradient: float


# What each may cost at most. The transient kernel writes four vectors a lane and segment, and asks
# before each whether it is whole.
BUDGETS = {
    "cluster_kernel<bfloat16, policy>": Cost(2000, 2150, 7.2, 6.5),
    "cluster_kernel<bfloat16, policy, entropy>": Cost(2900, 3600, 9.9, 8.5),
    "cluster_kernel<float16, policy>": Cost(2000, 2150, 7.2, 6.5),
    "cluster_kernel<float16, policy, entropy>": Cost(2900, 3600, 9.9, 8.5),
    "cluster_kernel<float32, policy>": Cost(2000, 2150, 9.2, 7.1),
    "cluster_kernel<float32, policy, entropy>": Cost(2900, 3800, 12.7, 9.1),
    "transient_kernel<bfloat16, policy>": Cost(0, 0, 6.7, 9.0),
    "transient_kernel<bfloat16, policy, entropy>": Cost(0, 0, 9.7, 11.4),
    "transient_kernel<float16, policy>": Cost(0, 0, 6.7, 9.0),
    "transient_kernel<float16, policy, entropy>": Cost(0, 0, 9.7, 11.4),
    "transient_kernel<float32, policy>": Cost(0, 0, 8.5, 11.8),
    "transient_kernel<float32, policy, entropy>": Cost(0, 0, 12.5, 14.7),
}


def is_for_the_night(name: str) -> bool:
    """What float16 makes is what bfloat16 does, within 2%; entropies take the longest to walk."""
    return "float16" in name.replace("bfloat16", "") or "entropy" in name


def longest_row(name: str) -> int:
    """Segments of 262,144 16-bit logits, or of 151,936 of float32."""
    return 297 if "float32" in name else 256


def unfenced(kernel: sass.Code) -> list[int]:
    """Where others are told on a path on which nothing was fenced since the last load."""
    loads = sass.places(kernel, "LDS")
    return sorted(
        set(sass.places(kernel, TELLS)) & sass.reachable(kernel, loads, r"FENCE\.VIEW\.ASYNC")
    )


def accountant_cycles(
    kernel: sass.Code, segments: int = USUAL, accountants: int = ACCOUNTANTS
) -> float:
    """For a row; without the look at 32 later rows at once, which a ballot ends.

    Of the loops within, those that merge are gone through as often as a row of so many segments
    asks for: a lane loads one at a time, or several, which the compiler has unrolled. The others,
    which wait, once.
    """
    loop = sass.loops_around(kernel, TELLS)[0]
    cycles = sass.cycles_around(kernel, loop, "VOTE")
    for merging in sass.loops_within(kernel, loop):
        if loads := len(sass.places(kernel, "LDS", merging)):
            times = -(-segments // (32 * loads))
            cycles += (times - 1) * sass.cycles_around(kernel, merging)
    return cycles / accountants


def instructions_an_element(kernel: sass.Code, name: str) -> tuple[float, float]:
    """Of a segment's sum, and of its gradient."""
    of_lane, of_vector = (16, 4) if "float32" in name else (32, 8)

    def exponentials(path: Collection[int]) -> int:
        return len(sass.places(kernel, EXPONENTIAL, path))

    loops = sass.innermost_loops(kernel, EXPONENTIAL)
    paths = [sass.fewest_around(kernel, loop) for loop in loops]
    # An entropy asks how much of the segment its largest logit has: one exponential more.
    more = int("entropy" in name)
    (sums,) = (
        path
        for path in paths
        if exponentials(path) == of_lane + more and sass.places(kernel, "SHFL", path)
    )
    if name.startswith("cluster"):
        (gradient,) = (
            path
            for path in paths
            if (stores := len(sass.places(kernel, r"STS\.128", path)))
            and exponentials(path) == stores * of_vector
        )
    else:
        (segment,) = (loop for loop in loops if sass.places(kernel, STORE, loop))
        gradient = sass.fewest_around(kernel, segment, sass.places(kernel, STORE, segment))
        assert exponentials(gradient) == of_lane
    return len(sums) / of_lane, len(gradient) / exponentials(gradient)


STORE = r"STG\.E\.EF\.128"


def cost(kernel: sass.Code, name: str, accountants: int = ACCOUNTANTS) -> Cost:
    of_rows = [0.0, 0.0]
    if name.startswith("cluster"):
        sizes = (USUAL, longest_row(name))
        of_rows = [accountant_cycles(kernel, n, accountants) for n in sizes]
    return Cost(*of_rows, *instructions_an_element(kernel, name))


def over(got: Cost, most: Cost) -> list[str]:
    return [
        f"{what}: {x:.1f}, at most {y}"
        for what, x, y in zip(Cost._fields, got, most, strict=True)
        if x > y
    ]


def problems(kernel: sass.Code) -> list[str]:
    """Of the cluster kernel's order of events."""
    found = []
    loops = [sass.loops_around(kernel, opcode)[0] for opcode in (TELLS, "STAS")]
    if any(sass.places(kernel, r"MEMBAR\.(ALL|SC)\.(GPU|SYS)", loop) for loop in loops):
        found.append("a fence of the whole GPU for each row")
    if unfenced(kernel):
        found.append("others are told without a fence")
    return found


def machine_code(name: str) -> dict[str, sass.Code]:
    """By architecture."""
    if cpu.native is None or not cpu.native.cuda_built or resources.find_cuobjdump() is None:
        pytest.skip("needs the module's CUDA part, and cuobjdump")
    found = {
        usage.arch: sass.disassemble(
            resources.find_cuobjdump(), cpu.native.__file__, usage.function, usage.arch
        )
        for usage in resources.usages(cpu.native.__file__)
        if usage.kernel == name and usage.arch in ("sm_90a", "sm_100f")
    }
    if not found:
        pytest.skip("built for neither 9.0a nor 10.0f")
    return found


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.nightly if is_for_the_night(n) else ()) for n in BUDGETS],
)
def test_the_budget_of_a_row(name: str) -> None:
    """With little to spare; and what the documentation says of it, by the compiler whose registers
    it has as well."""
    text = (ROOT / "docs" / "cuda.md").read_text()
    for arch, kernel in machine_code(name).items():
        got, most = cost(kernel, name), BUDGETS[name]
        assert over(got, most) == [], arch
        less = Cost(*(0.85 * x for x in most))
        assert len(over(got, less)) == sum(x > 0 for x in most), "a budget that forbids nothing"
        if name.startswith("cluster"):
            assert problems(kernel) == [], arch
            alone = over(cost(kernel, name, accountants=1), most)
            assert len(alone) == 2, "one accountant alone would take too long"
        if "float16" in name.replace("bfloat16", "") or NVCC is None:
            continue
        if forms.version() == "13.0.88":
            cycles = [str(round(x)) if x else "" for x in (got.usual, got.longest)]
            cells = [f"`{name}`", arch, *cycles, f"{got.sums:.1f}", f"{got.gradient:.1f}"]
            row = "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)
            assert row in text, row
