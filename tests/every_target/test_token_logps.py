"""token_logps: values, gradients through any torch objective, and memory reuse."""

from __future__ import annotations

import pytest
import torch
from oracle import logps64, make_case

import cfpo_kernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def reference64(
    logits: torch.Tensor, ids: torch.Tensor, temperature: object, dlogps: object, dentropy: object
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    leaf = logits.detach().double().requires_grad_()
    scaled = leaf / (temperature[:, None] if isinstance(temperature, torch.Tensor) else temperature)
    log_p = torch.log_softmax(scaled, -1)
    logps = log_p.gather(-1, ids[:, None]).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    (logps * dlogps + entropy * dentropy).sum().backward()
    return logps.detach(), entropy.detach(), leaf.grad


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("v", [1, 7, 1000, 50257, 262144])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(dtype: torch.dtype, v: int, inplace: bool) -> None:
    n = 5
    case = make_case(n, v, dtype, seed=v)
    g = torch.Generator().manual_seed(1)
    dlogps, dentropy = torch.randn(n, generator=g), torch.randn(n, generator=g)
    temperature = 0.5 + torch.rand(n, generator=g)
    want = reference64(case.logits, case.token_ids, temperature, dlogps, dentropy)

    logits = case.logits.clone().requires_grad_()
    logps, entropy = cfpo_kernels.token_logps(
        logits, case.token_ids, temperature=temperature, return_entropy=True, inplace=inplace
    )
    (logps * dlogps + entropy * dentropy).sum().backward()
    torch.testing.assert_close(logps.double(), want[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropy.double(), want[1], rtol=3e-6, atol=3e-6)
    error = (logits.grad.double() - want[2]).norm(dim=-1)
    allowed = 2e-5 * want[2].norm(dim=-1) + 1e-9
    if dtype != torch.float32:
        allowed += 1.1 * (want[2].to(dtype).double() - want[2]).norm(dim=-1)
    assert (error <= allowed).all()
    if inplace:
        assert logits.grad.data_ptr() == logits.data_ptr()


def test_every_instruction_set(level: str) -> None:
    case = make_case(7, 1000, torch.bfloat16, offset=1e4)
    want = logps64(case.logits, case.token_ids)
    got = cfpo_kernels.token_logps(case.logits, case.token_ids)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)


def test_likely_tokens_keep_their_relative_accuracy(level: str) -> None:
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


def test_reference_agrees() -> None:
    case = make_case(8, 300)
    for name in ("cpu", "reference"):
        logps, entropy = cfpo_kernels.token_logps(
            case.logits, case.token_ids, return_entropy=True, backend=name
        )
        want = logps64(case.logits, case.token_ids)
        torch.testing.assert_close(logps.double(), want, rtol=1e-6, atol=1e-6)
        assert entropy.shape == (8,)


def test_inplace_backward_runs_once() -> None:
    case = make_case(4, 100)
    logits = case.logits.clone().requires_grad_()
    logps = cfpo_kernels.token_logps(logits, case.token_ids, inplace=True).sum()
    logps.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logps.backward()
