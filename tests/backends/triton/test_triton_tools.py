"""The tools that check Triton kernels find the defects they are for, and nothing else.

Triton either interprets or compiles in a process: run pytest also with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from repository import SUPPORT
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime import driver
from triton_tools import controls
from triton_tools.checker import AccessError, RaceError, View, checked_launches
from triton_tools.interpreter import INTERPRETING, exp2_off_by, mend
from triton_tools.interpreter_ops import replace
from triton_tools.memory import sparse
from triton_tools.offline import fake, offline

interpreted = pytest.mark.skipif(not INTERPRETING, reason="needs TRITON_INTERPRET=1")
compiled = pytest.mark.skipif(INTERPRETING, reason="TRITON_INTERPRET=1 replaces the compiler")

BF16, F32 = torch.bfloat16, torch.float32


# Compiling


@compiled
@pytest.mark.parametrize(
    ("v", "offset", "bytes"), [(4096, 0, 16), (4096, 8, 16), (4096, 1, 2), (4095, 0, 2)]
)
def test_scalar_accesses_are_seen(v: int, offset: int, bytes: int) -> None:
    with offline("sm_90") as launches:
        x = fake((4, v), BF16, offset=offset)
        controls.launch_copy_rows(x, x)
    (launch,) = launches
    assert launch.grid == (4,) and launch.arguments["n_cols"] == v
    for kind in ("load", "store"):
        assert {access.bytes for access in launch.streaming(kind)} == {bytes}
    assert launch.count("load", bytes=bytes, looped=True) == len(launch.streaming("load"))


@compiled
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_registers_and_loops_on_every_target(arch: str) -> None:
    with offline(arch) as launches:
        x = fake((4096,), F32)
        controls.centre[(1,)](x, x, 4096)
        controls.sum_table[(1,)](x, x, 16, 4096, 1024)
    straight, nested = launches
    assert 8 < straight.registers < 255 and straight.spills == 0 and straight.code.stack == 0
    assert straight.code.barriers > 0 and straight.shared > 0
    assert straight.count("load", looped=True) == 0
    with pytest.raises(AssertionError, match="no load in a loop"):
        straight.streaming("load")
    assert {a.depth for a in nested.streaming("load")} == {2}
    assert {a.depth for a in nested.streaming("store")} == {1}


@compiled
def test_spills_are_seen() -> None:
    with offline("sm_90") as launches:
        x = fake((16384,), F32)
        controls.centre[(1,)](x, x, 16384, num_warps=1)
        controls.centre[(1,)](x, x, 16384, num_warps=8)
    spilling, fine = launches
    assert spilling.spills > 100 and spilling.code.stack > 0
    assert fine.spills == 0 and fine.num_warps == 8


@compiled
def test_recompilation_is_seen() -> None:
    with offline("sm_90") as launches:
        for v in (1024, 2048, 4096):
            x = fake((4, v), BF16)
            controls.launch_copy_rows(x, x)
            controls.zero_row[(1,)](fake((v,), F32), v, 1024)
        assert launches.specialisations(controls.copy_rows) == 1
        assert launches.specialisations(controls.zero_row) == 3
        x = fake((4, 1025), BF16)
        controls.launch_copy_rows(x, x)
        assert launches.specialisations(controls.copy_rows) == 2
    with offline("sm_90") as launches:
        assert launches.specialisations(controls.copy_rows) == 0


@compiled
def test_tuples_heuristics_functions_and_none() -> None:
    with offline("sm_90") as launches:
        x = fake((99,), F32)
        controls.add_optional[(1,)]((x, x), None, 99)
        controls.add_optional[(1,)]((x, x), x, 99)
        y = fake((4, 1024), F32)
        controls.launch_copy_rows(y, y)
        controls.launch_copy_rows(y, y, FUNCTION=controls.double)
    assert [launch.count("load") for launch in launches[:2]] == [1, 2]
    assert launches[0].arguments["BLOCK"] == 128
    assert launches.specialisations(controls.add_optional) == 2
    assert launches.specialisations(controls.copy_rows) == 2


@compiled
def test_a_block_leaves_nothing_behind() -> None:
    run, active = triton.JITFunction.run, driver._active
    with offline("sm_90"), pytest.raises(KeyError, match="no_such_option"):
        controls.launch_copy_rows(fake((4, 16), F32), fake((4, 16), F32), no_such_option=1)
    assert triton.JITFunction.run is run and driver._active is active
    assert not controls.copy_rows.device_caches


@compiled
def test_the_command_line() -> None:
    command = [sys.executable, "-m", "triton_tools.offline", "sm_80"]
    done = subprocess.run(
        [*command, "triton_tools.controls:launch_examples"],
        cwd=SUPPORT,
        env=os.environ | {"TRITON_INTERPRET": "0"},
        check=True,
        capture_output=True,
        text=True,
    )
    first, second = map(json.loads, done.stdout.splitlines())
    assert first["kernel"] == "copy_rows" and first["accesses"]["load16@1"] > 0
    assert second["kernel"] == "add_optional" and second["arch"] == "sm_80"


# Interpreting: memory


def rows(n: int, v: int, stride: int, dtype: torch.dtype = F32, offset: int = 0) -> Tensor:
    storage = torch.full((offset + n * stride,), 7.0, dtype=dtype)
    return storage.as_strided((n, v), (stride, 1), offset)


@interpreted
@pytest.mark.parametrize("v", [1, 7, 1000, 2048])
@pytest.mark.parametrize("stride", [2048, 2051])
def test_a_right_kernel_passes(v: int, stride: int) -> None:
    x, y = rows(5, v, stride, BF16, offset=3), rows(5, v, stride)
    with checked_launches() as log:
        controls.launch_copy_rows(x, y)
        controls.launch_copy_rows(y, y)
        controls.launch_copy_rows(x.expand(5, v), y[:, :v])
    assert torch.equal(x.float(), y)
    for launch in log.launches:
        assert launch.kernel == "copy_rows" and launch.grid == (5, 1, 1)
        assert (launch.writes("y_ptr") == 1).all() and (launch.reads("x_ptr") == 1).all()
    assert not log.launches[0].reads("y_ptr").any()
    assert (log.launches[1].reads("y_ptr") == 1).all(), "an alias was read"
    with pytest.raises(KeyError, match="it got x_ptr, y_ptr"):
        log.launches[0].reads("z_ptr")


@interpreted
@pytest.mark.parametrize(
    ("bug", "stride", "error", "message"),
    [
        (
            "ends late",
            16,
            AccessError,
            r"program \(0, 0, 0\): store to y_ptr outside.* 10 elements",
        ),
        (
            "ends late",
            10,
            AccessError,
            r"program \(3, 0, 0\): store to y_ptr outside.* 40 elements",
        ),
        ("repeats lanes", 10, AccessError, "writes an element twice"),
        ("other width", 10, AccessError, "store to y_ptr by 2 bytes; its elements have 4"),
        ("wild pointer", 10, AccessError, "store to an address that no argument leads to"),
        ("odd address", 10, AccessError, "0 elements and 1 bytes from its start"),
        ("shares rows", 10, RaceError, "programs 0 and 1 share memory of y_ptr.* offset 0"),
    ],
)
def test_wrong_accesses_are_caught(
    bug: str, stride: int, error: type[Exception], message: str
) -> None:
    with checked_launches(), pytest.raises(error, match=message):
        controls.launch_copy_rows(rows(4, 10, 10), rows(4, 10, stride), bug=bug)


@interpreted
def test_a_neighbouring_argument_is_out_of_bounds() -> None:
    storage = torch.zeros(20)
    with checked_launches(), pytest.raises(AccessError, match="store to y_ptr outside"):
        controls.launch_copy_rows(storage[10:][None], storage[:10][None], bug="ends late")


@interpreted
def test_wrong_counts_are_seen() -> None:
    x, y = rows(3, 10, 10), rows(3, 10, 12)
    with checked_launches() as log:
        for bug in ("begins late", "ends early", "stores twice"):
            controls.launch_copy_rows(x, y, bug=bug)
    late, early, twice = (launch.writes("y_ptr") for launch in log.launches)
    assert (late[:, 0] == 0).all() and (late[:, 1:] == 1).all()
    assert (early[:, -1] == 0).all() and (early[:, :-1] == 1).all()
    assert (twice == 2).all()


@interpreted
def test_a_read_of_what_another_program_writes_is_a_race() -> None:
    x = rows(4, 10, 10)
    with checked_launches():
        controls.launch_copy_rows(x, rows(4, 10, 10), bug="reads the next row")
        with pytest.raises(RaceError, match="share memory of x_ptr and y_ptr"):
            controls.launch_copy_rows(x, x, bug="reads the next row")


@interpreted
def test_atomics_race_with_plain_accesses_only() -> None:
    counter, seen = torch.zeros(1, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    with checked_launches() as log:
        controls.count_programs[(4,)](counter, seen, LOOK=False)
        assert counter.item() == log.launches[-1].writes("counter_ptr").item() == 4
        with pytest.raises(RaceError, match="share memory of counter_ptr"):
            controls.count_programs[(4,)](counter, seen, LOOK=True)


VIEWS = {
    "permuted": torch.zeros(2, 3, 5).permute(2, 0, 1)[1:, :, ::2],
    "rows with holes": torch.zeros(60).as_strided((3, 4), (17, 2), 5),
    "expanded": torch.zeros(3)[1:, None].expand(2, 4),
    "scalar": torch.zeros(3)[1],
    "empty": torch.zeros(0, 3),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_know_their_elements(name: str) -> None:
    view = View(name, VIEWS[name])
    where = [
        view.base + 4 * sum(i * s for i, s in zip(index, view.tensor.stride(), strict=True))
        for index in np.ndindex(*view.tensor.shape)
    ]
    around = np.arange(view.base - 40, view.base + 400)
    assert view.elements(around).tolist() == [address in where for address in around]
    for address in where:
        counts = view.counts([(address, address + 4)])
        assert counts.shape == view.tensor.shape
        assert counts.reshape(-1).tolist() == [int(other == address) for other in where]
    everything = [(view.base - 8, view.base + 400), (view.base - 8, view.base)]
    assert (view.counts(everything) == 1).all()


@interpreted
def test_tuples_and_missing_arguments() -> None:
    pair, bias = (torch.zeros(4), torch.zeros(4)), torch.ones(1)
    with checked_launches() as log:
        controls.add_optional[(1,)](pair, None, 3)
        controls.add_optional[(1,)](pair, bias_ptr=bias, n=2)
    first, second = log.launches
    assert first.writes("pointers[1]").tolist() == [1, 1, 1, 0]
    assert second.writes("pointers[1]").tolist() == second.reads("pointers[0]").tolist()
    assert second.reads("bias_ptr") == 1 and pair[1].tolist() == [1, 1, 0, 0]


@interpreted
def test_offsets_beyond_2_to_the_31() -> None:
    stride = 2**31 - 8
    x, y = rows(3, 100, 100, BF16), sparse(3 * stride, BF16).as_strided((3, 100), (stride, 1))
    with checked_launches() as log:
        controls.launch_copy_rows(x, y)
    assert (log.launches[-1].writes("y_ptr") == 1).all() and (y == 7).all()
    with checked_launches():
        with pytest.raises(AccessError, match=r"program \(2, 0, 0\): store.* -16 elements"):
            controls.launch_copy_rows(x, y, bug="int32 offset")
        with pytest.raises(AssertionError, match="int32 overflow"):
            controls.launch_copy_rows(x, y, bug="int32 product")


@interpreted
def test_overlapping_views_are_refused() -> None:
    with checked_launches(), pytest.raises(ValueError, match="elements overlap"):
        controls.launch_copy_rows(rows(3, 10, 10), torch.zeros(100).as_strided((3, 10), (5, 1)))


# Interpreting: values


def all_16_bit(dtype: torch.dtype) -> Tensor:
    return torch.arange(2**16).to(torch.int16).view(dtype)


def any_float32(n: int = 2**18) -> Tensor:
    """Random bits, and what lies at, just below and just above the ties of bfloat16."""
    bits = torch.randint(-(2**31), 2**31, (n,), generator=torch.Generator().manual_seed(0))
    around = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    ties = (torch.arange(2**16)[:, None] * 2**16 + around).flatten()
    return torch.cat([bits, ties]).to(torch.int32).view(F32)


def apply(op: str, x: Tensor, y: Tensor | None = None, z: Tensor | None = None, **out) -> Tensor:
    mend()
    result = torch.empty(x.shape, dtype=out.get("dtype", x.dtype))
    block = min(triton.next_power_of_2(len(x)), 2**16)
    y, z = x if y is None else y, x if z is None else z
    controls.apply[(triton.cdiv(len(x), block),)](x, y, z, result, len(x), OP=op, BLOCK=block)
    return result


def same(got: Tensor, want: Tensor) -> bool:
    return torch.equal(got.nan_to_num(123), want.nan_to_num(123)) and torch.equal(
        got.isnan(), want.isnan()
    )


@interpreted
@pytest.mark.parametrize("to", [BF16, torch.float16, F32, torch.float64], ids=str)
def test_conversions_round_as_torch_does(to: torch.dtype) -> None:
    sources = [all_16_bit(BF16), all_16_bit(torch.float16), any_float32()]
    sources.append(torch.randint(-(2**31), 2**31, (2**16,), dtype=torch.int64).to(torch.int32))
    if to != torch.float16:  # torch rounds twice, by way of float32
        sources.append(any_float32().double() * 1.0000001)
    for x in sources:
        assert same(apply("convert", x, dtype=to), x.to(to)), x.dtype


@interpreted
def test_an_explicit_rounding() -> None:
    x = any_float32()
    assert same(apply("convert rtne", x, dtype=BF16), x.to(BF16))
    with pytest.raises(NotImplementedError, match="rounding"):
        apply("convert rtz", x, dtype=BF16)


@interpreted
def test_exact_operations() -> None:
    x = torch.cat([all_16_bit(BF16).float(), any_float32()])
    y = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(1))]
    # Not torch.fmax, which returns a signalling NaN, nor torch.sqrt, which is an ulp off.
    cases: dict[str, Tensor] = {
        "add": x + y, "subtract": x - y, "multiply": x * y, "divide": x / y, "negate": -x,
        "less": (x < y).float(), "equal": (x == y).float(), "abs": x.abs(), "floor": x.floor(),
        "sqrt": x.double().sqrt().float(), "maximum with nan": torch.maximum(x, y),
        "clamp": torch.where(x.isnan(), -1, x.clamp(-1, 2)),
        "where": torch.where(torch.arange(len(x)) % 2 == 0, x, y),
    }  # fmt: skip
    for op, function in {"maximum": torch.maximum, "minimum": torch.minimum}.items():
        cases[op] = torch.where(x.isnan(), y, torch.where(y.isnan(), x, function(x, y)))
    for op, want in cases.items():
        assert same(apply(op, x, y), want), op


@interpreted
def test_transcendental_operations_are_the_hardwares() -> None:
    x = torch.cat([all_16_bit(BF16).float(), any_float32()])
    x64, tiny = x.double(), torch.finfo(F32).tiny
    for op, function in {"log": torch.log, "log2": torch.log2, "exp2": torch.exp2}.items():
        want = function(x64)
        got = apply(op, x)
        assert torch.equal(got.isnan(), want.isnan()), op
        normal = (want.abs() >= tiny) & (want.abs() < torch.finfo(F32).max)
        assert ((got / want - 1).abs()[normal] < 2**-22).all(), op
    flushed = apply("exp2", torch.tensor([-126.0, -126.5, -149.0]))
    assert flushed.tolist() == [tiny, 0.0, 0.0]
    whole = torch.arange(-100.0, 100.0)
    with exp2_off_by(2.0**-22):
        assert torch.equal(apply("exp2", whole), 2**whole * (1 - 2.0**-22))
    assert torch.equal(apply("exp2", whole), 2**whole)
    inside = x[x.abs() < 80]
    error = (apply("exp", inside) / inside.double().exp() - 1).abs()
    assert (error < 2**-22 + 2**-23 * inside.abs()).all()
    assert error.max() > 2**-20, "the rounded product of x and log2(e) is not simulated"


@interpreted
def test_fma_rounds_once() -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 500, generator=g)
    z = -(x * y) * (1 + torch.randint(-2, 3, (500,), generator=g) * 2**-23)
    got = apply("fma", x, y, z).numpy()
    for g, a, b, c in zip(got, x.tolist(), y.tolist(), z.tolist(), strict=True):
        exact = Fraction(a) * Fraction(b) + Fraction(c)
        beside = [np.nextafter(g, np.float32(side)) for side in (-math.inf, math.inf)]
        error = abs(Fraction(float(g)) - exact)
        assert all(error <= abs(Fraction(float(other)) - exact) for other in beside)


@interpreted
@pytest.mark.parametrize(
    "op", ["add", "subtract", "multiply", "negate", "less", "equal", "fma", "sum"]
)
def test_arithmetic_on_bfloat16_is_refused(op: str) -> None:
    with pytest.raises(TypeError, match="of bfloat16: convert to float32 first"):
        apply(op, torch.ones(8, dtype=BF16))


@interpreted
@pytest.mark.parametrize("op", ["abs", "where", "max", "convert"])
def test_what_is_right_on_bfloat16(op: str) -> None:
    x = all_16_bit(BF16).flip(0)
    y = x.roll(1234)
    assert same(apply(op, x, y), apply(op, x.float(), y.float()).to(BF16))


@interpreted
def test_reductions() -> None:
    x = torch.randn(1024, generator=torch.Generator().manual_seed(0))
    log2e = math.log2(math.e)
    want = (x.double() / log2e).logsumexp(0) * log2e
    assert (apply("log-sum-exp2", x) - want).abs().max() < 1e-6
    x[[100, 700]] = 9.0
    assert (apply("argmax", x) == 100).all(), "of equals the first"
    x[5] = math.nan
    assert (apply("max", x) == 9).all() and apply("sum", x).isnan().all()


@interpreted
def test_python_operators_are_elementwise() -> None:
    x, y = torch.tensor([0.0, 0.0, 3.0, 1.5]), torch.tensor([0.0, 2.0, 0.0, 2.0])
    assert apply("and or not", x, y).tolist() == [0, 1, 1, 0]
    assert apply("python min", x, y).tolist() == [0, 0, 0, 1.5]
    with pytest.raises(TypeError, match="neither true nor false"):
        apply("if block", x, y)
    with pytest.raises(TypeError, match="chained comparison 0 < n < 5"):
        controls.chain[(1,)](x, 3)


@interpreted
def test_masked_lanes_without_other_are_undefined() -> None:
    assert apply("no other", torch.ones(4)).isnan().tolist() == [False, False, True, True]
    assert apply("no other", torch.ones(4, dtype=BF16)).isnan().sum() == 2
    assert apply("no other", torch.ones(4, dtype=torch.int32)).tolist() == [1, 1, 0x5A, 0x5A]
    assert not apply("scalar other", torch.ones(4)).any()


@interpreted
def test_arguments_have_the_types_of_a_compiled_kernel() -> None:
    mend()
    out = torch.zeros(8, dtype=torch.float64)
    controls.argument_types[(1,)](out, 0.1, 2**31 + 8, True, 2)
    square = float(np.float32(0.1) * np.float32(0.1))
    assert out.tolist() == [square, float((2**31 + 8) ** 2), 1.0, 0.0, 2.0**30, 0, 0, 0]
    with pytest.raises(AssertionError, match="int32 overflow"):
        controls.argument_types[(1,)](out, 0.1, 5, False, 3)


@compiled
def test_nothing_is_mended_where_nothing_is_interpreted() -> None:
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        mend()


def test_a_triton_without_the_mended_parts_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"has no .*\.no_such_operation"):
        replace(tl, "no_such_operation", lambda original: original)
