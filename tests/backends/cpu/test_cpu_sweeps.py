"""Where the CPU's sweeps change from one form to another: offsets, sizes of gradients, segments."""

from __future__ import annotations

import pytest
import torch
from oracle import (
    Case,
    Outcome,
    check,
    check_gradient,
    logps64,
    make_case,
    oracle,
    run,
    with_everything,
)

import cfpo_kernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def run_without_entropy(case: Case) -> Outcome:
    """`run` asks for statistics, and with an entropy other sums are made."""
    logits = case.logits.detach().clone().requires_grad_()
    loss = cfpo_kernels.policy_loss(
        logits,
        case.token_ids,
        case.advantages,
        case.old_logps,
        objective=case.objective,
        **case.options,
    )
    assert isinstance(loss, torch.Tensor)
    loss.sum().backward()
    assert logits.grad is not None
    logps = cfpo_kernels.token_logps(case.logits, case.token_ids)
    assert isinstance(logps, torch.Tensor)
    return Outcome(loss.detach(), logits.grad, logps, torch.zeros_like(logps))


def check_without_entropy(case: Case) -> Outcome:
    got, want = run_without_entropy(case), oracle(case)
    check_gradient(got.dlogits, want.dlogits, case)
    torch.testing.assert_close(got.logps.double(), want.logps, rtol=1e-6, atol=1e-6)
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [-5e3, -300.0, -72.0, -60.0, 300.0, 360.0, 5e3, 13e3])
def test_offsets(dtype: torch.dtype, offset: float, level: str) -> None:
    # Exponentials are taken apart exactly only for references from -100 to 16384; the exponent
    # field of a bfloat16 gradient is found without a detour for those up to some 500.
    case = make_case(6, 9001, dtype, offset=offset)
    check(case)
    check_without_entropy(case)
    check(with_everything(case))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e-28, 1e20, 1e27, 1e32])
def test_sizes_of_gradients(dtype: torch.dtype, size: float, level: str) -> None:
    case = make_case(6, 9001, dtype, reduction="sum")
    case.old_logps = logps64(case.logits, case.token_ids).float() - 0.05
    case.advantages = torch.tensor([1.0, -1.0, 0.7, -0.7, 1.3, -1.3]) * size
    got = check(case)
    assert got.dlogits.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_peak_between_the_guess_and_the_guard(dtype: torch.dtype, level: str) -> None:
    # From 16 to 200 binades above the guess of the reference: summed again, and never lost.
    for height in (8.0, 12.0, 40.0, 85.0, 90.0, 140.0):
        case = make_case(4, 9001, dtype, spread=0.5)
        case.logits[:, 8500] = height
        case.token_ids[:2] = 8500
        case.old_logps = logps64(case.logits, case.token_ids).float() - 0.05
        if height < 80:
            check(case)
            check_without_entropy(case)
            continue
        got, want = run(case), oracle(case)  # the gradients leave float32
        torch.testing.assert_close(got.logps.double(), want.logps, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(got.dlogits.double(), want.dlogits, rtol=1e-2, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_cols", [8192 + 4000, 5000], ids=str)
def test_bans_change_no_bit_of_the_others(dtype: torch.dtype, n_cols: int, level: str) -> None:
    """Sums and gradients do without clamps where no element is far below the others."""
    case = make_case(6, n_cols, dtype)
    alone = run_without_entropy(case)
    banned = torch.full((6, 64), -float("inf"), dtype=dtype)
    case.logits = torch.cat([case.logits, banned], 1)
    got = run_without_entropy(case)
    assert torch.equal(got.logps, alone.logps)
    assert torch.equal(got.dlogits[:, :n_cols], alone.dlogits)
    assert got.dlogits[:, n_cols:].count_nonzero() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", [0, 5, 4200, 9000, 9210])
def test_one_element_far_below(dtype: torch.dtype, place: int, level: str) -> None:
    """Anywhere: beside the target, in the last columns, and alone in its segment."""
    for low in (-100.0, -1e4, -float("inf")):
        case = make_case(4, 9213, dtype, offset=-3.0)
        case.token_ids[:] = torch.tensor([1, 4210, 9001, 9212])
        case.old_logps = logps64(case.logits, case.token_ids).float() - 0.05
        case.logits[:, place] = low
        got = check_without_entropy(case)
        assert got.dlogits[:, place].count_nonzero() == 0


@pytest.mark.parametrize("place", [5, 4200, 9210])
def test_a_negative_nan_anywhere(place: int, level: str) -> None:
    case = make_case(4, 9213, torch.bfloat16)
    case.token_ids[:] = torch.tensor([1, 4210, 9001, 9212])
    case.logits.view(torch.int16)[:, place] = -64  # 0xFFC0
    got = run_without_entropy(case)
    assert got.logps.isnan().all() and got.dlogits.isnan().all()
