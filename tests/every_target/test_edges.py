"""Numbers at the edge: infinities, NaN, offsets, likely tokens, memory layouts, size 0."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import (
    DTYPES,
    Case,
    check,
    check_gradient,
    logps64,
    make_case,
    oracle,
    peak_over_a_flat_tail,
    run,
    with_everything,
)
from targets import Target

import cfpo_kernels
from cfpo_kernels import CFPO


@pytest.mark.not_on("reference", reason="its float32 sums are torch's: 3e-4")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("peak", [0.5, 0.9, 0.99, 0.999, 0.9999])
def test_likely_tokens(dtype: torch.dtype, peak: float) -> None:
    # A kernel that stores p and subtracts 1 afterwards is 100% off at 0.999 in bfloat16.
    check(make_case(26, 4096, dtype, peak=peak))
    check(with_everything(make_case(26, 4096, dtype, peak=peak)))


@pytest.mark.not_on("reference", reason="its float32 sums are torch's: 3e-4")
@pytest.mark.parametrize("offset", [1e4, -1e4, 123456.0])
def test_common_offset(offset: float) -> None:
    check(make_case(13, 4099, offset=offset))
    check(with_everything(make_case(13, 4099, offset=offset)))


def test_offset_changes_nothing_beyond_the_rounding_of_the_inputs() -> None:
    base = make_case(13, 50257, offset=0.0)
    base.logits = (base.logits * 1024).round() / 1024  # exact also with the offset added
    base.old_logps = logps64(base.logits, base.token_ids).float() - 0.1
    shifted = Case(base.logits + 8192.0, base.token_ids, base.advantages, base.old_logps)
    assert torch.equal(shifted.logits - 8192.0, base.logits)
    got, want = run(shifted), run(base)
    torch.testing.assert_close(got.logps, want.logps, rtol=0, atol=2e-6)
    error = (got.dlogits - want.dlogits).norm(dim=-1) / want.dlogits.norm(dim=-1).clamp_min(1e-12)
    assert error.max() < 3e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_banned_tokens(dtype: torch.dtype) -> None:
    for fill in (-math.inf, torch.finfo(dtype).min):
        case = with_everything(make_case(13, 4099, dtype))
        banned = torch.rand(13, 4099, generator=torch.Generator().manual_seed(3)) < 0.7
        banned[5, :] = True  # only the target is left
        banned[6, :2000] = True  # the whole first block, where the reference is looked for
        banned.scatter_(1, case.token_ids[:, None], False)
        case.logits[banned] = fill
        case.old_logps = (
            logps64(case.logits, case.token_ids, case.options["temperature"]).float() - 0.05
        )
        case.options["ref_logps"] = case.old_logps + 0.1
        got = check(case)
        assert not got.dlogits[banned].any()
        assert got.logps[5] == 0 and abs(got.entropy[5]) < 1e-12


def test_an_outlier_far_from_the_first_columns() -> None:
    # The reference is guessed from the first 512 columns; here the guess is 300 nats too low.
    for column in (0, 511, 512, 8191, 8192, 20000):
        for height in (30.0, 300.0, 1e4):
            case = make_case(3, 20001)
            case.logits[:, column] = height
            case.token_ids[:] = torch.tensor([column, 7, 19999])
            case.old_logps = logps64(case.logits, case.token_ids).float() - 0.05
            got, want = run(case), oracle(case)
            torch.testing.assert_close(got.logps.double(), want.logps, rtol=1e-6, atol=1e-6)
            # log p of -1e4 is itself only known to 5e-4 in float32.
            rtol = 2e-3 if height == 1e4 else 1e-4
            torch.testing.assert_close(got.dlogits.double(), want.dlogits, rtol=rtol, atol=1e-7)


@pytest.mark.parametrize("poison", [math.nan, math.inf, "all -inf"])
@pytest.mark.parametrize("v", [7, 1000, 20001])
def test_a_bad_row_touches_no_other(poison: object, v: int) -> None:
    case = make_case(8, v)
    check(case)
    bad = Case(case.logits.clone(), case.token_ids, case.advantages, case.old_logps)
    bad.token_ids[4] = 0
    case.token_ids[4] = 0
    clean = run(case)
    if poison == "all -inf":
        bad.logits[4] = -math.inf
    else:
        bad.logits[4, v // 2] = poison
    got = run(bad)
    others = torch.arange(8) != 4
    assert torch.equal(got.dlogits[others], clean.dlogits[others])
    assert torch.equal(got.logps[others], clean.logps[others])
    assert got.logps[4].isnan() and got.entropy[4].isnan() and got.dlogits[4].isnan().all()


# Quiet and signalling, of both signs, with payloads; 0xFFC0... is what x86 makes.
NANS = {
    torch.float32: (
        *(0x7FC00000, 0xFFC00000, 0x7FC00001, 0x7F800001),
        *(0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF),
    ),
    torch.bfloat16: (0x7FC0, 0xFFC0, 0x7FC1, 0x7F81, 0xFF81, 0x7FFF, 0xFFFF),
    torch.float16: (0x7E00, 0xFE00, 0x7E01, 0x7C01, 0xFC01, 0x7FFF, 0xFFFF),
}


@pytest.mark.parametrize("dtype", NANS, ids=str)
def test_every_nan_stays_nan(dtype: torch.dtype) -> None:
    """Integer tricks on floats' bits can carry a NaN's payload into a number."""
    bits, width = torch.tensor(NANS[dtype]), 8 * dtype.itemsize
    integer = torch.int32 if width == 32 else torch.int16
    case = make_case(len(bits) + 1, 1000, dtype)
    signed = torch.where(bits >> (width - 1) == 1, bits - (1 << width), bits).to(integer)
    case.logits.view(integer)[:-1, 500] = signed
    assert case.logits.isnan().sum() == len(bits)
    got = run(case)
    assert got.dlogits[:-1].isnan().all() and got.logps[:-1].isnan().all()
    assert got.dlogits[-1].isfinite().all() and got.logps[-1].isfinite()


@pytest.mark.not_on("reference", reason="its float32 sums are torch's: 3e-4")
@pytest.mark.parametrize("below", [12.0, 23.0, 24.5, 26.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_flat_tail_far_below_the_peak(dtype: torch.dtype, below: float) -> None:
    for top in (0.01, 10.0):
        check(peak_over_a_flat_tail(100_000, dtype, top, below))


@pytest.mark.parametrize("height", [1e6, 1e7, 1e8, 1.4e9])
def test_huge_logits(height: float) -> None:
    for v in (3, 1000, 20001):
        case = make_case(4, v)
        case.logits[:, -1] = height
        case.logits[1, 0] = height
        case.token_ids[:] = torch.tensor([v - 1, 0, v - 1, 0])
        case.old_logps = None
        got, want = run(case), oracle(case)
        torch.testing.assert_close(got.logps.double(), want.logps, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(got.dlogits.double(), want.dlogits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fill", [-1e8, -1e9, -1e10, -1e30])
def test_bans_that_fill_whole_segments(fill: float) -> None:
    for banned in (513, 9000, 17000):
        case = make_case(3, 20001)
        case.logits[:, :banned] = fill
        case.token_ids[:] = torch.tensor([19990, 18000, 20000])
        case.old_logps = logps64(case.logits, case.token_ids).float() - 0.1
        assert not check(case).dlogits[:, :banned].any()


@pytest.mark.parametrize("gap", [4.0, 8.0, 11.0])
def test_entropy_of_a_peak_far_above_the_guess(gap: float) -> None:
    # The guess of the reference may be too low by at most 2^16 before the sums lose digits.
    case = make_case(4, 8192, spread=0.1)
    case.logits[:, 5000] = gap + case.logits[:, :512].amax()
    got, want = run(case), oracle(case)
    torch.testing.assert_close(got.entropy.double(), want.entropy, rtol=3e-5, atol=0)


@pytest.mark.not_on("reference", reason="it has no such limit")
def test_logits_beyond_the_limit_give_nan() -> None:
    for height in (1.6e9, 1e20, 3e38, -1.6e9, -3e38):
        case = make_case(4, 1000)
        case.logits[0, 3] = abs(height)
        case.logits[1] = height
        got = run(case)
        assert got.logps[:2].isnan().all() and got.dlogits[:2].isnan().all()
        assert got.dlogits[2:].isfinite().all()
    case.logits[1] = -1e9  # what many use to ban tokens
    assert run(case).logps[1].exp().item() == pytest.approx(1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [0.5, 0.9, 8.0, 1e30])
def test_temperatures(temperature: float, dtype: torch.dtype) -> None:
    # log p is known to 3e-8 of its size, so the tolerances suppose logits / T of an ordinary size.
    spread = min(2.0, 2.0 * temperature)
    check(make_case(8, 1000, dtype, temperature=temperature, spread=spread, reduction="sum"))


def test_a_very_low_temperature() -> None:
    case = make_case(8, 1000, temperature=1e-4)
    got, want = run(case), oracle(case)
    torch.testing.assert_close(got.logps.double(), want.logps, rtol=1e-6, atol=1e-6)


def test_nan_from_outside_stays_nan() -> None:
    """In bfloat16 too, where rounding a NaN with all payload bits set would carry into a zero."""
    nan = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    for dtype in DTYPES:
        for i in range(2):
            case = make_case(3, 1000, dtype, reduction="none")
            case.advantages[1] = nan[i]
            got = run(case)
            assert got.dlogits[1].isnan().all() and got.loss[1].isnan()
            assert got.dlogits[0].isfinite().all()

            logits = make_case(3, 1000, dtype).logits.requires_grad_()
            loss = cfpo_kernels.cfpo_loss(
                logits, case.token_ids, torch.ones(3), reduction="none", inplace=False
            )
            loss.backward(torch.stack([torch.tensor(1.0), nan[i], torch.tensor(1.0)]))
            assert logits.grad[1].isnan().all() and logits.grad[0].isfinite().all()


def test_a_bad_row_is_nan_on_policy_too() -> None:
    for junk in (math.nan, math.inf, -math.inf):
        logits = torch.randn(3, 100)
        logits[1] = junk if junk == -math.inf else logits[1]
        logits[1, 5] = junk
        loss = cfpo_kernels.cfpo_loss(
            logits, torch.tensor([1, 5, 2]), torch.ones(3), reduction="none"
        )
        assert loss.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("v", [7, 20001])
def test_masked_rows_may_hold_anything(v: int) -> None:
    case = with_everything(make_case(12, v, mask_every=4))
    masked = ~case.mask()
    clean = check(case)
    for junk in (math.nan, math.inf, -math.inf):
        case.logits[masked] = junk
        case.token_ids[masked] = -100
        for x in (case.old_logps, case.advantages):
            x[masked] = junk
        for name in ("ref_logps", "token_weights", "temperature"):
            case.options[name][masked] = junk
        got = run(case)
        assert torch.equal(got.dlogits, clean.dlogits) and torch.equal(got.loss, clean.loss)
        assert not got.dlogits[masked].view(torch.int32).any()


@pytest.mark.parametrize("reduction", ["token-mean", "sum", "none"])
def test_all_masked(reduction: str) -> None:
    case = make_case(6, 50, reduction=reduction, mask=torch.zeros(6))
    case.options["normalizer"] = torch.tensor(0)  # the token count of such a batch
    logits = case.logits.clone().requires_grad_()
    loss = cfpo_kernels.cfpo_loss(
        logits, case.token_ids, case.advantages, case.old_logps, **case.options
    )
    assert loss.requires_grad and not loss.any()
    loss.sum().backward()
    assert not logits.grad.any()


def test_an_incoming_nan_does_not_reach_masked_rows() -> None:
    case = make_case(4, 50, reduction="none", mask=torch.tensor([1, 0, 1, 0]))
    for junk in (math.nan, math.inf):
        logits = case.logits.clone().requires_grad_()
        loss = cfpo_kernels.cfpo_loss(
            logits,
            case.token_ids,
            case.advantages,
            case.old_logps,
            **case.options,
        )
        loss.backward(torch.tensor([1.0, junk, 1.0, junk]))
        assert not logits.grad[[1, 3]].any() and logits.grad[[0, 2]].any()


def test_flush_to_zero_leaves_float16_subnormals_alone() -> None:
    case = make_case(3, 1000, torch.float16, normalizer=1e4)
    want = run(case)
    torch.set_flush_denormal(True)
    try:
        logits = case.logits.clone().requires_grad_()
        loss = cfpo_kernels.cfpo_loss(
            logits, case.token_ids, case.advantages, case.old_logps, **case.options
        )
        (loss * 0.5).backward()
    finally:
        torch.set_flush_denormal(False)
    assert (logits.grad != 0).sum() > 0.6 * (want.dlogits != 0).sum()


def test_zero_advantage_beats_an_overflowing_ratio() -> None:
    case = make_case(4, 100)
    case.old_logps = torch.full((4,), -1e4)
    case.advantages = torch.zeros(4)
    got = run(case)
    assert got.loss == 0 and not got.dlogits.any()
    case.advantages = torch.ones(4)
    got = run(case)
    assert got.loss == math.inf  # not NaN
    case.objective = CFPO(log_ratio_clip=5.0)
    got = run(case)
    assert got.loss.isfinite() and not got.dlogits.any()


def test_n_is_zero() -> None:
    for shape in ((0, 10), (3, 0, 10), (0, 4, 10)):
        logits = torch.zeros(shape, requires_grad=True)
        tokens = torch.zeros(shape[:-1], dtype=torch.int64)
        loss, stats = cfpo_kernels.cfpo_loss(
            logits, tokens, torch.zeros(shape[:-1]), return_stats=True
        )
        loss.backward()
        assert loss == 0 and logits.grad.shape == shape
        assert stats.logps.shape == shape[:-1]
        assert cfpo_kernels.token_logps(logits, tokens).shape == shape[:-1]


def test_one_row_without_leading_dimensions() -> None:
    case = make_case(1, 1000)
    row = Case(case.logits[0], case.token_ids[0], case.advantages[0], case.old_logps[0])
    got, want = run(row), run(case)
    assert got.loss == want.loss and torch.equal(got.dlogits, want.dlogits[0])


def views(base: torch.Tensor) -> dict[str, torch.Tensor]:
    """(3, 4, V) logits in memory of every kind."""
    b, t, v = base.shape
    wide = torch.full((b, t + 2, v + 3), 7.0, dtype=base.dtype)
    made = {
        "sliced": torch.full((b, t + 1, v), 7.0, dtype=base.dtype)[:, :-1],
        "padded columns": wide[:, 1:-1, 1 : v + 1],
        "transposed": torch.empty(t, b, v, dtype=base.dtype).transpose(0, 1),
        "every second row": torch.full((b, 2 * t, v), 7.0, dtype=base.dtype)[:, ::2],
        "misaligned": torch.empty(b * t * v + 1, dtype=base.dtype)[1:].view(b, t, v),
    }
    for view in made.values():
        view.copy_(base)
    return made


# Of 32 segments and more, which emulated GPUs split.
LONG = pytest.param(
    33411,
    marks=pytest.mark.nightly_on("triton-*", reason="30 s, and 16411 has their segments"),
)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("v", [1, 65, 1000, 16411, LONG])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(dtype: torch.dtype, v: int, inplace: bool) -> None:
    flat = make_case(12, v, dtype, mask_every=5)
    want = check(flat, inplace=inplace)
    for name, logits in views(flat.logits.view(3, 4, v)).items():
        case = Case(
            logits,
            flat.token_ids.view(3, 4),
            flat.advantages.view(3, 4),
            flat.old_logps.view(3, 4),
            {"mask": flat.options["mask"].view(3, 4)},
        )
        got = run(case, inplace=inplace)
        assert torch.equal(got.dlogits.reshape(12, v), want.dlogits), name
        assert torch.equal(got.loss, want.loss), name


@pytest.mark.not_on("reference", reason="it never overwrites the logits")
def test_inplace_writes_nothing_beside_its_rows() -> None:
    for dtype in DTYPES:
        for v in (1, 5, 63, 64, 65, 127, 1000):
            storage = torch.full((4, v + 6), 3.0, dtype=dtype)
            logits = storage[:, 2 : v + 2]
            logits.normal_()
            p = torch.softmax(logits.double(), -1)
            leaf = logits.detach().requires_grad_()
            loss = cfpo_kernels.cfpo_loss(
                leaf, torch.zeros(4, dtype=torch.int64), torch.ones(4), inplace=True
            )
            loss.backward()
            assert (storage[:, :2] == 3).all() and (storage[:, v + 2 :] == 3).all()
            error = (logits[:, 1:].double() - p[:, 1:] / 4).norm()  # of -mean log p
            assert error <= 5e-3 * p[:, 1:].norm() / 4 + 1e-12


def test_four_dimensions_with_strides_that_do_not_merge() -> None:
    big = torch.randn(4, 6, 5, 40)
    logits = big[::2, ::3, ::2]  # (2, 2, 3, 40)
    ids = torch.randint(0, 40, (2, 2, 3))
    advantages, old = torch.randn(2, 2, 3), logps64(logits, ids).float() - 0.1
    for inplace in (False, True):
        got = check(Case(logits, ids, advantages, old), inplace=inplace)
        flat = Case(logits.reshape(12, 40), ids.view(12), advantages.view(12), old.view(12))
        assert torch.equal(got.dlogits.reshape(12, 40), run(flat).dlogits)
    logps = cfpo_kernels.token_logps(logits, ids)
    torch.testing.assert_close(logps.double(), logps64(logits, ids), rtol=1e-6, atol=1e-6)


ANY_SHAPE = {
    "dtype": st.sampled_from(DTYPES),
    "b": st.integers(1, 4),
    "t": st.integers(1, 5),
    "v": st.integers(1, 300) | st.sampled_from([511, 513, 8192, 8193, 16385]),
    "row_step": st.integers(1, 3),
    "column": st.integers(0, 3),
    "masked": st.integers(0, 2**20 - 1),
    "inplace": st.booleans(),
    "everything": st.booleans(),
    "seed": st.integers(0, 1000),
}


def test_any_shape_stride_and_mask(target: Target) -> None:
    slow = [HealthCheck.too_slow]
    chosen = settings(max_examples=target.examples, deadline=None, suppress_health_check=slow)
    chosen(given(**ANY_SHAPE)(any_shape_stride_and_mask))()


def any_shape_stride_and_mask(
    dtype: torch.dtype,
    b: int,
    t: int,
    v: int,
    row_step: int,
    column: int,
    masked: int,
    inplace: bool,
    everything: bool,
    seed: int,
) -> None:
    flat = make_case(b * t, v, dtype, seed=seed)
    flat.options["mask"] = torch.tensor([(masked >> i) & 1 == 0 for i in range(b * t)])
    if everything:
        flat = with_everything(flat)
    memory = torch.zeros(b, t * row_step + 1, v + column, dtype=dtype)
    logits = memory[:, : t * row_step : row_step, column:]
    logits.copy_(flat.logits.view(b, t, v))
    options = {
        name: x.view(b, t) if isinstance(x, torch.Tensor) and x.dim() == 1 else x
        for name, x in flat.options.items()
    }
    case = Case(
        logits,
        flat.token_ids.view(b, t),
        flat.advantages.view(b, t),
        flat.old_logps.view(b, t),
        options,
    )
    if case.mask().any():
        check(case, inplace=inplace)
    else:
        assert not run(case, inplace=inplace).dlogits.any()


@pytest.mark.slow
@pytest.mark.not_on("reference", reason="torch's indexing is torch's")
@pytest.mark.not_on("triton-*", reason="test_triton_interpreted.py and test_gpu_triton.py have one")
@pytest.mark.nightly_on("cpu-*", reason="4 GB, and the code is that of the best level")
def test_offsets_beyond_32_bits() -> None:
    # The last rows of a view start beyond element 2^31 of its storage; only they are touched.
    v = 4096
    rows = 2**31 // v + 3
    storage = torch.empty(
        rows * v, dtype=torch.float16
    )  # 4.3 GB of address space, mostly untouched
    logits = storage.view(rows, v)
    case = make_case(3, v, torch.float16)
    logits[-3:] = case.logits
    leaf = logits.detach().requires_grad_()
    mask = torch.zeros(rows, dtype=torch.bool)
    mask[-3:] = True
    ids = torch.zeros(rows, dtype=torch.int64)
    ids[-3:] = case.token_ids
    advantages, old = torch.zeros(rows), torch.zeros(rows)
    advantages[-3:], old[-3:] = case.advantages, case.old_logps
    with torch.no_grad():
        loss = cfpo_kernels.cfpo_loss(leaf, ids, advantages, old, mask=mask)
    torch.testing.assert_close(loss, run(case).loss)
    strided = storage.as_strided((3, v), ((rows - 1) // 2 * v, 1)).detach()
    strided.copy_(case.logits)
    strided.requires_grad_()
    cfpo_kernels.cfpo_loss(
        strided, case.token_ids, case.advantages, case.old_logps, inplace=True
    ).backward()
    check_gradient(strided.grad, oracle(case).dlogits, case)
