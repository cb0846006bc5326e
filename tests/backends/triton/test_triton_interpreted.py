"""The Triton kernels under the interpreter: every access, every layout, and the golden table.

Only where TRITON_INTERPRET=1 was set before Triton was imported (``make test`` runs such a process
of its own). There tests/every_target runs on these kernels too; this file has what is particular to
them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from golden_shapes import GOLDEN, SHAPES, problem_of, row_shape
from oracle import Case, check_gradient, make_case, oracle, run, with_everything
from triton_tools.checker import AccessError, RaceError, checked_launches
from triton_tools.interpreter import INTERPRETING, exp2_off_by, mend
from triton_tools.memory import sparse

import cfpo_kernels
from cfpo_kernels import CFPO, PPOClip
from cfpo_kernels.backends import triton as backend
from cfpo_kernels.backends.triton import TRITON
from cfpo_kernels.inputs import LossSettings
from cfpo_kernels.objectives import OBJECTIVES
from cfpo_kernels.shapes import Shape
from cfpo_kernels.triton_kernels import config, kernels, objective, scalar_math, softmax
from cfpo_kernels.verification import battery, cases

pytestmark = pytest.mark.skipif(not INTERPRETING, reason="TRITON_INTERPRET=1 is not set")

if INTERPRETING:
    mend()

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def processors(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Sets the number of processors that the interpreter pretends to have."""

    def pretend(count: int) -> None:
        device = config.Device(count)
        monkeypatch.setattr(backend, "_device", lambda _: device)

    yield pretend


# Scalars


@triton.jit
def policy_kernel(
    tokens_ptr,  # (n, 5): logp, log r, advantage, low, high
    numbers_ptr,  # (8,)
    terms_ptr,  # (n, 2): loss, dlogp
    drift,
    token_weight,
    OBJECTIVE: tl.constexpr,
):
    token = tokens_ptr + tl.program_id(0) * 5
    loss, dlogp, _ = objective.token_loss(
        tl.load(token),
        tl.load(token + 1),
        0.0,
        0.0,
        tl.load(token + 2),
        token_weight,
        1.0,
        tl.load(token + 3),
        tl.load(token + 4),
        drift,
        tl.load(numbers_ptr),
        tl.load(numbers_ptr + 1),
        tl.load(numbers_ptr + 2),
        tl.load(numbers_ptr + 3),
        tl.load(numbers_ptr + 4),
        tl.load(numbers_ptr + 5),
        tl.load(numbers_ptr + 6),
        tl.load(numbers_ptr + 7),
        0.0,
        0.0,
        OBJECTIVE,
        None,
        False,
    )
    tl.store(terms_ptr + tl.program_id(0) * 2, loss)
    tl.store(terms_ptr + tl.program_id(0) * 2 + 1, dlogp)


@triton.jit
def unary_kernel(x_ptr, y_ptr, n, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0.5)
    tl.store(y_ptr + i, FUNCTION(x), mask=i < n)


@triton.jit
def kl_kernel(d_ptr, x_ptr, loss_ptr, dlogp_ptr, KL: tl.constexpr, RATIO_WEIGHTED: tl.constexpr):
    i = tl.program_id(0)
    loss, dlogp = objective.kl_term(tl.load(d_ptr + i), tl.load(x_ptr + i), KL, RATIO_WEIGHTED)
    tl.store(loss_ptr + i, loss)
    tl.store(dlogp_ptr + i, dlogp)


@triton.jit
def log1p_of(x):
    log, correction = scalar_math.log1p_near(x)
    return log + correction


def terms_of(shape: Shape, tokens: list[tuple[float, ...]], token_weight: float = 1.0) -> Any:
    """(n, 2) of loss and dlogp; tokens: (logp, log r, advantage)."""
    rows = torch.tensor(
        [
            (*token, *(getattr(shape, f"{end}_{sign}") for end in ("low", "high")))
            for token in tokens
            for sign in ("positive" if token[2] > 0 else "negative",)
        ],
        dtype=torch.float32,
    )
    out = torch.empty(len(tokens), 2)
    policy_kernel[(len(tokens),)](
        rows,
        torch.tensor(shape[backend._FIRST_OF_ITS_OWN :], dtype=torch.float32),
        out,
        shape.drift,
        token_weight,
        OBJECTIVE=objective.OBJECTIVES[shape.kind],
    )
    return out.double()


@pytest.mark.parametrize("row", GOLDEN["policy"], ids=lambda row: row["note"])
def test_golden_policy(row: dict) -> None:
    shape = OBJECTIVES[row["objective"]](**row["parameters"]).shape()
    row = row | {"logp": -1.0}
    got = terms_of(shape, [(row["logp"], row["log_ratio"], row["advantage"])])[0].tolist()
    assert problem_of(row, shape, got) == ""


def test_golden_shapes() -> None:
    problems = []
    for row in SHAPES["policy"]:
        shape = row_shape(row)
        got = terms_of(shape, [(row["logp"], row["log_ratio"], row["advantage"])])[0].tolist()
        problems.append(problem_of(row, shape, got))
    assert len(problems) == 568 and [problem for problem in problems if problem] == []


@pytest.mark.parametrize(
    "row", GOLDEN["kl"] + SHAPES["kl"], ids=lambda row: f"{row['estimator']} {row['d']}"
)
def test_golden_kl(row: dict) -> None:
    d = torch.tensor([row["d"]], dtype=torch.float32)
    x = torch.tensor([row.get("log_ratio", 0.0)], dtype=torch.float32)
    loss, dlogp = torch.empty(1), torch.empty(1)
    weighted = row["estimator"].endswith("r")
    estimator = objective.KL_ESTIMATORS[row["estimator"].removesuffix("r")]
    kl_kernel[(1,)](d, x, loss, dlogp, KL=estimator, RATIO_WEIGHTED=weighted)
    assert loss.item() == pytest.approx(row["loss"], rel=1e-6, abs=1e-7)
    assert dlogp.item() == pytest.approx(row["dlogp"], rel=1e-6, abs=1e-7)


def unary(function: Any, x: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    y = torch.empty_like(x, dtype=dtype)
    unary_kernel[(1,)](x, y, len(x), FUNCTION=function, BLOCK=triton.next_power_of_2(len(x)))
    return y


def test_elementary_functions() -> None:
    x = torch.cat([torch.linspace(-20, 88.7, 40001), torch.logspace(-30, 0, 2001)])
    x = torch.cat([x, -x[-2001:]])
    want = torch.expm1(x.double())
    assert ((unary(scalar_math.expm1, x).double() - want) / want).abs().nan_to_num(0).max() < 3e-7
    ends = torch.tensor([-1e4, -math.inf, 88.8, 1e4, math.inf, math.nan, 0.0])
    got = unary(scalar_math.expm1, ends).tolist()
    assert got[:5] == [-1, -1, math.inf, math.inf, math.inf]
    assert math.isnan(got[5]) and got[6] == 0

    q = torch.cat([torch.linspace(0, 1 / 3, 20001)[1:], torch.logspace(-30, -1, 2001)])
    q = torch.cat([q, -q])
    want = torch.log1p(q.double())
    got = unary(log1p_of, q)
    assert ((got.double() - want) / want).abs().max() < 1.2e-7

    s = torch.logspace(-30, 30, 4001)
    error = unary(scalar_math.log2, s, torch.float64) - torch.log2(s.double())
    assert error.abs().max() < 1e-8
    assert unary(scalar_math.log2, torch.tensor([math.nan]), torch.float64).isnan().all()


def test_powers_of_two_are_exact() -> None:
    """In float32's normal range; what exp2 gives elsewhere, too."""
    n = torch.arange(-126.0, 128.0)
    with exp2_off_by(2.0**-22):
        assert torch.equal(unary(scalar_math.power_of_two, n).double(), 2 ** n.double())
        far = torch.tensor([-127.0, -150, -(2.0**32), -math.inf, 128, 2.0**32, math.inf, math.nan])
        got = unary(scalar_math.power_of_two, far).tolist()
    assert got[:7] == [0, 0, 0, 0, math.inf, math.inf, math.inf] and math.isnan(got[7])


# Accesses


def strided(n: int, v: int, dtype: torch.dtype, step: int, first: int) -> torch.Tensor:
    """(n, v) with rows `step` elements apart, from element `first` of their storage."""
    return torch.full((first + n * step,), 7.0, dtype=dtype)[first:].as_strided(
        (n, v), (step, 1), first
    )


LAYOUTS = {
    "aligned": (1000, 1000, 0),
    "aligned odd": (1001, 1008, 0),
    "odd": (1001, 1001, 0),
    "odd from 3": (1001, 1001, 3),
    "wide from 5": (1000, 1003, 5),
    "one": (1, 1, 0),
    "seven": (7, 7, 2),
    "block": (4096, 4096, 0),
    "block and one": (4097, 4097, 1),
    "segment and one": (16385, 16385, 0),
}


def of_rows(counts: Any, like: torch.Tensor) -> Any:
    """Counts of rows that the launcher passed as one flat view from an aligned address on."""
    if counts.ndim == 2:
        return counts
    n, v = like.shape
    first = counts.size - (n - 1) * like.stride(0) - v
    return np.stack([counts[first + i * like.stride(0) :][:v] for i in range(n)])


@pytest.mark.parametrize("count", [1, 64], ids=["whole", "split"])
@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_every_access(
    dtype: torch.dtype, layout: str, inplace: bool, count: int, processors: Any
) -> None:
    """Nothing outside the views, no races, each gradient element written once, masked rows not
    read, unmasked rows read twice by the fused kernel, nearly."""
    processors(count)
    v, step, first = LAYOUTS[layout]
    case = with_everything(make_case(5, v, dtype, mask_every=3))
    logits = strided(5, v, dtype, step, first)
    logits.copy_(case.logits)
    leaf = logits.detach().requires_grad_()
    storage = logits.untyped_storage().nbytes() // logits.element_size()
    with checked_launches() as log:
        cfpo_kernels.cfpo_loss(
            leaf,
            case.token_ids,
            case.advantages,
            case.old_logps,
            inplace=inplace,
            backend="triton",
            **case.options,
        ).backward()
    masked = ~case.mask()
    fused = next(each for each in log.launches if each.kernel == "policy_loss_kernel")
    tile = config.tile(v, logits.element_size())
    # Backward launches nothing: on a CPU it sees that the factor is 1.
    assert (len(log.launches) == 2) == (count == 64 and v > tile.segment)
    written = of_rows(fused.writes("dlogits_ptr"), logits if inplace else leaf.grad)
    assert (written == 1).all()
    reads = sum(
        of_rows(each.reads("logits_ptr"), logits)
        for each in log.launches
        if each.kernel in ("policy_loss_kernel", "sum_segments_kernel")
    )
    assert not reads[masked].any()
    guessed = min(v, tile.block)
    pieces = -(-v // tile.segment) if count == 64 else 1
    assert (reads[~masked] >= 2).all()
    # Beyond the two sweeps: the columns of the guess, and the target. (A row of nothing but its
    # target has no columns to guess from.) One of few elements may have a peak: three more.
    most = (5 if v == 7 else 2) * v + pieces * guessed + pieces + 1
    assert v == 1 or (reads[~masked].sum(1) <= most).all()
    check_gradient(leaf.grad, oracle(case).dlogits, case)
    if not inplace:
        outside = torch.ones(storage, dtype=torch.bool)
        outside.as_strided(logits.shape, logits.stride(), logits.storage_offset()).fill_(False)
        everything = torch.empty(0, dtype=dtype).set_(logits.untyped_storage())
        assert (everything[outside] == 7).all()


@pytest.mark.parametrize("count", [1, 64], ids=["whole", "split"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
def test_every_access_of_split_calls(
    layout: str, inplace: bool, count: int, processors: Any
) -> None:
    processors(count)
    v, step, first = LAYOUTS[layout]
    case = make_case(5, v, torch.bfloat16, mask_every=3)
    logits = strided(5, v, torch.bfloat16, step, first)
    logits.copy_(case.logits)
    leaf = logits.detach().requires_grad_()
    with checked_launches() as log:
        logps, entropy = cfpo_kernels.token_logps(
            leaf,
            case.token_ids,
            mask=case.mask(),
            return_entropy=True,
            inplace=inplace,
            backend="triton",
        )
        (logps * 0.5 + entropy * 0.1).sum().backward()
    backward = log.launches[-1]
    assert backward.kernel == "token_logps_backward_kernel"
    assert (of_rows(backward.writes("dlogits_ptr"), logits if inplace else leaf.grad) == 1).all()
    reads = of_rows(backward.reads("logits_ptr"), logits)
    # The entropy of a row of one element is 0: its peak is looked for, too.
    most = v + 1 if v > 1 else 3
    assert not reads[~case.mask()].any() and (reads[case.mask()].sum(1) <= most).all()
    exact = case.logits.double().requires_grad_()
    log_p = torch.log_softmax(exact, -1)
    picked = log_p.gather(1, case.token_ids[:, None]).squeeze(1)
    row_entropy = -(log_p.exp() * log_p).sum(-1)
    ((picked * 0.5 + row_entropy * 0.1) * case.mask()).sum().backward()
    error = (leaf.grad.double() - exact.grad).norm(dim=-1)
    rounding = (exact.grad.bfloat16().double() - exact.grad).norm(dim=-1)
    assert (error <= 1.1 * rounding + 1e-5 * exact.grad.norm(dim=-1) + 1e-12).all()


def test_multiplied_rows() -> None:
    for v, step, first in LAYOUTS.values():
        x = strided(5, v, torch.bfloat16, step, first)
        x.copy_(torch.randn(5, v))
        want = x.float() * torch.tensor([1.0, 0.5, -3.0, 1.0, 0.0])[:, None]
        with checked_launches() as log:
            backend.TRITON.multiply_rows(x, torch.tensor([1.0, 0.5, -3.0, 1.0, 0.0]))
        assert torch.equal(x.float(), want.bfloat16().float())
        (launch,) = log.launches
        touched = of_rows(launch.writes("logits_ptr"), x)
        assert not touched[[0, 3]].any() and (touched[[1, 2, 4]] == 1).all()


def test_offsets_beyond_32_bits() -> None:
    v, step = 1001, 2**31 + 5  # odd: every row another shift
    case = make_case(3, v, torch.bfloat16)
    logits = sparse(3 * step, torch.bfloat16).as_strided((3, v), (step, 1))
    logits.copy_(case.logits)
    leaf = logits.detach().requires_grad_()
    with checked_launches():
        cfpo_kernels.cfpo_loss(
            leaf, case.token_ids, case.advantages, case.old_logps, inplace=True, backend="triton"
        ).backward()
    check_gradient(leaf.grad, oracle(case).dlogits, case)


# Reproducibility


@pytest.mark.parametrize(
    "dtype, v",
    [*((dtype, v) for dtype in DTYPES for v in (7, 1000, 4097)), (torch.bfloat16, 50257)],
    ids=str,
)
def test_a_row_depends_on_itself_only(dtype: torch.dtype, v: int, processors: Any) -> None:
    """Neither on its address, nor the other rows, nor how many programs share it, nor whether the
    gradient is wanted."""
    case = with_everything(make_case(4, v, dtype))
    processors(1)
    want = run(case, backend="triton")
    check_gradient(want.dlogits, oracle(case).dlogits, case)

    def same(got: Any, rows: Any = slice(None)) -> None:
        assert torch.equal(got.logps, want.logps[rows])
        assert torch.equal(got.entropy, want.entropy[rows])
        assert torch.equal(got.dlogits, want.dlogits[rows])

    for first in (1, 2, 3, 8):
        moved = strided(4, v, dtype, v + first % 3, first)
        moved.copy_(case.logits)
        other = Case(moved, case.token_ids, case.advantages, case.old_logps, case.options)
        same(run(other, backend="triton"))
        same(run(other, backend="triton", inplace=True))
    processors(64)
    same(run(case, backend="triton"))
    same(run(case, backend="triton", inplace=True))
    one = {k: x[2:3] if isinstance(x, torch.Tensor) else x for k, x in case.options.items()}
    one["normalizer"] = 4.0
    row = Case(
        case.logits[2:3], case.token_ids[2:3], case.advantages[2:3], case.old_logps[2:3], one
    )
    same(run(row, backend="triton"), slice(2, 3))
    for count in (1, 64):
        processors(count)
        logps, entropy = cfpo_kernels.token_logps(
            case.logits,
            case.token_ids,
            temperature=case.options["temperature"],
            return_entropy=True,
            backend="triton",
        )
        assert torch.equal(logps, want.logps) and torch.equal(entropy, want.entropy)


def test_a_row_depends_on_itself_only_whatever_exp2_does(processors: Any) -> None:
    """ex2.approx may err by 2^-22, and nothing says that whole numbers are an exception. The sums
    of a row that programs share meet more powers of two than those of a whole one."""
    with exp2_off_by(2.0**-22):
        test_a_row_depends_on_itself_only(torch.float32, 4097, processors)


@pytest.mark.parametrize("v", [1000, 4097, 20000])
def test_a_guess_that_fails(v: int, processors: Any) -> None:
    """Segments far above, or far below, the columns that the reference is guessed from."""
    for count in (1, 64):
        processors(count)
        for at, height in ((v - 1, 40.0), (v // 2, 300.0), (0, 300.0)):
            case = make_case(4, v)
            case.logits[:, at] = height
            case.old_logps = None
            got, want = run(case, backend="triton"), oracle(case)
            torch.testing.assert_close(got.logps.double(), want.logps, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(got.dlogits.double(), want.dlogits, rtol=1e-5, atol=1e-12)


# Against others


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_cpu_kernels(dtype: torch.dtype) -> None:
    from cfpo_kernels import backends, ops

    case = with_everything(make_case(13, 5003, dtype, mask_every=5))
    got = run(case, backend="triton")
    rows = (case.logits, case.token_ids, case.mask().float() / case.mask().sum())
    inputs = [
        case.advantages,
        case.old_logps,
        case.options["token_weights"],
        case.options["ref_logps"],
        None,
        None,
    ]
    settings = LossSettings(CFPO().shape(), kl_coef=0.1, entropy_coef=0.05)
    terms = (inputs, *ops.flat(settings), None)
    assert backends.kernels("cpu") is not backends.kernels("triton")
    _, logps, entropy, dlogits = ops.policy_loss(
        *rows, case.options["temperature"], True, True, "cpu", *terms
    )
    torch.testing.assert_close(got.logps, logps, rtol=3e-7, atol=1e-6)
    torch.testing.assert_close(got.entropy, entropy, rtol=3e-6, atol=1e-6)
    rounding = {torch.float32: 2e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[dtype]
    torch.testing.assert_close(
        got.dlogits, dlogits, rtol=rounding, atol=6e-8 if dtype == torch.float16 else 1e-9
    )


@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_equals_ligers_grpo(beta: float) -> None:
    """Its PPO objective, loss and gradient, in float32: the same formula by other hands."""
    liger = pytest.importorskip("liger_kernel.transformers.grpo_loss")
    b, t, v = 3, 4, 1000
    case = make_case(b * (t + 1), v, spread=1.0)
    logits = case.logits.view(b, t + 1, v)
    ids = case.token_ids.view(b, t + 1)[:, :-1].contiguous()
    old = case.old_logps.view(b, t + 1)[:, :-1].contiguous()
    mask = torch.ones(b, t)
    mask[1, 2:] = 0
    advantages = torch.tensor([1.0, -0.7, 0.4])
    ref = old + 0.1 if beta else None
    theirs = logits.clone().requires_grad_()
    per_token, _, _ = liger.triton_grpo_loss(
        theirs,
        old,
        ref,
        ids,
        advantages,
        mask,
        temperature=0.9,
        beta=beta,
        eps_low=0.2,
        eps_high=0.3,
        inplace=False,
        loss_type="grpo",
        reduce=False,
    )
    (per_token * mask).sum().backward()
    ours = logits.clone().requires_grad_()
    loss = cfpo_kernels.policy_loss(
        ours[:, :-1],
        ids,
        advantages,
        old,
        objective=PPOClip(0.2, 0.3),
        mask=mask,
        reduction="none",
        temperature=0.9,
        ref_logps=ref,
        kl_coef=beta,
        backend="triton",
    )
    loss.sum().backward()
    torch.testing.assert_close(loss, per_token * mask, rtol=2e-5, atol=2e-6)
    scale = theirs.grad.norm(dim=-1)
    assert ((ours.grad - theirs.grad).norm(dim=-1) <= 2e-5 * scale + 1e-9).all()
    assert (scale[:, :-1][mask.bool()] > 1e-4).any()


# The checks themselves


@triton.jit
def one_too_many(start, first, end, BLOCK: tl.constexpr, SHIFTED: tl.constexpr):
    places = start + tl.arange(0, BLOCK)
    return (places >= first) & (places < end + 1)


@triton.jit
def one_too_few(start, first, end, BLOCK: tl.constexpr, SHIFTED: tl.constexpr):
    places = start + tl.arange(0, BLOCK)
    return (places >= first) & (places < end - 1)


@triton.jit
def narrow_place(
    row, first, inner, outer_stride, inner_stride, UNIT: tl.constexpr, SHIFTED: tl.constexpr
):
    offset = (first + (row % inner) * inner_stride) * UNIT
    return offset.to(tl.int32).to(tl.int64), tl.zeros([], tl.int32)


def test_an_access_outside_is_found(monkeypatch: pytest.MonkeyPatch, processors: Any) -> None:
    monkeypatch.setattr(softmax, "_inside", one_too_many)
    with pytest.raises(AccessError):
        test_every_access(torch.bfloat16, "odd", True, 1, processors)


def test_a_missing_column_is_found(monkeypatch: pytest.MonkeyPatch, processors: Any) -> None:
    monkeypatch.setattr(softmax, "_inside", one_too_few)
    with pytest.raises(AssertionError):
        test_every_access(torch.bfloat16, "odd", True, 1, processors)


def test_a_32_bit_offset_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "row_place", narrow_place)
    with pytest.raises((AccessError, AssertionError)):
        test_offsets_beyond_32_bits()


def test_a_race_is_found(monkeypatch: pytest.MonkeyPatch, processors: Any) -> None:
    """Two programs that write the same piece of a row."""

    @triton.jit
    def overlapping(piece, n_pieces, n_places, SEGMENT: tl.constexpr):
        begin = piece * SEGMENT
        return begin, tl.maximum(begin, n_places)

    monkeypatch.setattr(kernels, "_piece", overlapping)
    with pytest.raises(RaceError):
        test_every_access(torch.bfloat16, "segment and one", False, 64, processors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_battery_of_a_first_use_passes(dtype: torch.dtype) -> None:
    target = battery.Target("triton", TRITON, torch.device("cpu"), 2, largest=4096)
    assert battery.run(target, dtype, cases.short(), lambda case, phase: None) > 30


# Objectives of users


@triton.jit
def truncated(logp, log_ratio, advantage, low, high, most, p1, p2, p3, p4, p5, p6, p7):
    """-sg(min(r, most)) A logp between the bounds."""
    weight = tl.minimum(tl.exp(log_ratio), most)
    weight = tl.where((log_ratio < low) | (log_ratio > high), 0.0, weight)
    return -weight * advantage * logp, -weight * advantage


def test_an_objective_of_a_user() -> None:
    chosen = cfpo_kernels.register_triton_objective("truncated", truncated, (1.1,), drift=0.1)
    case = make_case(33, 300)
    case.options["log_ratio_bounds"] = (-0.35, 0.27)
    case.objective = cfpo_kernels.IcePop(drift=0.1)

    def in_torch(terms: cfpo_kernels.TokenTerms) -> torch.Tensor:
        r = terms.log_ratio.detach().exp().clamp(max=1.1)
        outside = (terms.log_ratio < -0.35) | (terms.log_ratio > 0.27)
        loss = -torch.where(outside, 0.0, r) * terms.advantages * terms.logps
        return loss + 0.05 * terms.log_ratio**2

    got = run(Case(**(vars(case) | {"objective": chosen})), backend="triton")
    del case.options["log_ratio_bounds"]
    want = run(Case(**(vars(case) | {"objective": in_torch})), backend="reference")
    assert got.dlogits.abs().sum() > 0
    torch.testing.assert_close(got.dlogits, want.dlogits, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=1e-6)
    for how in ({"backend": "cpu"}, {"backend": "triton", "ratio_level": "sequence"}):
        with pytest.raises(ValueError, match="'truncated' is written in Triton"):
            run(Case(**(vars(case) | {"objective": chosen})), **how)
    with pytest.raises(ValueError, match="stands for another function"):
        cfpo_kernels.register_triton_objective("truncated", objective.window)
    with pytest.raises(ValueError, match=r"fn must take logp, .*, got d"):
        cfpo_kernels.register_triton_objective("k1", objective.k1)
