"""token_logps: values, gradients through any torch objective, and memory reuse."""

from __future__ import annotations

import pytest
import torch
from oracle import DTYPES, check_token_logps, logps64, make_case

import cfpo_kernels


@pytest.mark.not_on("reference", reason="its sums are torch's, and it never overwrites")
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("v", [1, 7, 1000, 50257, 262144])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(dtype: torch.dtype, v: int, inplace: bool) -> None:
    check_token_logps(dtype, v, inplace=inplace)


def test_an_offset_of_all_logits() -> None:
    case = make_case(7, 1000, torch.bfloat16, offset=1e4)
    want = logps64(case.logits, case.token_ids)
    got = cfpo_kernels.token_logps(case.logits, case.token_ids)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.not_on("reference", reason="its float32 sums are torch's: 3e-4")
def test_likely_tokens_keep_their_relative_accuracy() -> None:
    # log p = -1e-4: a sum that held the target as well would leave three digits of it.
    for peak in (0.5, 0.9, 0.99, 0.9999, 0.999999):
        case = make_case(6, 4096, peak=peak)
        want = logps64(case.logits, case.token_ids)
        got = cfpo_kernels.token_logps(case.logits, case.token_ids)
        torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=0)


def test_mask_and_zero_gradients() -> None:
    case = make_case(6, 1000)
    logits = case.logits.clone()
    logits[2] = torch.nan
    logits.requires_grad_()
    mask = torch.tensor([1, 1, 0, 1, 1, 1])
    ids = case.token_ids.clone()
    ids[2] = -100
    logps, entropy = cfpo_kernels.token_logps(logits, ids, mask=mask, return_entropy=True)
    assert logps[2] == 0 and entropy[2] == 0 and torch.isfinite(logps).all()
    (logps[0] + entropy[1]).backward()
    rows = logits.grad.abs().sum(-1)
    assert (rows[:2] > 0).all() and not logits.grad[2:].any()


def test_trains_any_objective() -> None:
    """REINFORCE on torch's side equals autograd through log_softmax."""
    case = make_case(8, 300)
    ours = case.logits.clone().requires_grad_()
    (-cfpo_kernels.token_logps(ours, case.token_ids) * case.advantages).mean().backward()
    theirs = case.logits.clone().requires_grad_()
    picked = torch.log_softmax(theirs, -1).gather(1, case.token_ids[:, None]).squeeze(1)
    (-picked * case.advantages).mean().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-9)


def test_shapes() -> None:
    case = make_case(8, 300)
    logps, entropy = cfpo_kernels.token_logps(case.logits, case.token_ids, return_entropy=True)
    want = logps64(case.logits, case.token_ids)
    torch.testing.assert_close(logps.double(), want, rtol=1e-6, atol=1e-6)
    assert entropy.shape == (8,)


@pytest.mark.not_on("reference", reason="it never overwrites the logits")
def test_inplace_backward_runs_once() -> None:
    case = make_case(4, 100)
    logits = case.logits.clone().requires_grad_()
    logps = cfpo_kernels.token_logps(logits, case.token_ids, inplace=True).sum()
    logps.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logps.backward()
