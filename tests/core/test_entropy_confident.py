"""The entropy of rows where one token has nearly all the mass, whichever token is asked for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import cfpo_kernels

N, V = 24, 20001
# Nats over the other logits, whose standard deviation is 2: 1 - p from 0.1 to 4e-9.
PEAKS = (14.0, 18.0, 25.0, 32.0)


def confident(peak: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits (N, V) and the column (N,) of each row's likeliest token."""
    g = torch.Generator().manual_seed(int(peak))
    logits = torch.randn(N, V, generator=g) * 2
    top = torch.randint(600, V, (N,), generator=g)
    top[:4] = torch.tensor([0, 5, 511, V - 1])  # where the reference is guessed; the end
    logits.scatter_(1, top[:, None], peak)
    second = (top + 9000) % V  # a second likely one, in another segment, half as likely as the rest
    logits.scatter_(1, second[:, None], 11.2)
    return logits.to(dtype), top


def exact(logits: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """H (N,) and dH/dlogits (N, V) in float64 without a small difference."""
    d = logits.double() - logits.double().gather(1, top[:, None])
    e = d.exp().scatter(1, top[:, None], 0.0)
    s = e.sum(-1)
    entropy = torch.log1p(s) - (d * e).sum(-1) / (1 + s)
    p = d.exp() / (1 + s)[:, None]
    return entropy, -p * (d - torch.log1p(s)[:, None] + entropy[:, None])


def off_by(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm(dim=-1) / want.norm(dim=-1)).max().item()


def asked(name: str, top: Tensor) -> Tensor:
    if name == "likeliest":
        return top.clone()
    return torch.where(top == 7, 8, 7) if name == "another" else (top + 9000) % V


@pytest.mark.parametrize("token", ["likeliest", "another", "second"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_scored(backend: str, dtype: torch.dtype, token: str, level: str) -> None:
    for peak in PEAKS:
        logits, top = confident(peak, dtype)
        want, gradient = exact(logits, top)
        leaf = logits.clone().requires_grad_()
        _, entropy = cfpo_kernels.token_logps(
            leaf, asked(token, top), return_entropy=True, backend=backend
        )
        assert (entropy.double() / want - 1).abs().max() < 3e-6
        entropy.sum().backward()
        assert off_by(leaf.grad, gradient) < (1e-5 if dtype == torch.float32 else 4.2e-3)
        at_top = leaf.grad.gather(1, top[:, None]).double() / gradient.gather(1, top[:, None]) - 1
        assert at_top.abs().max() < (1e-5 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("token", ["likeliest", "another", "second"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_fused(backend: str, dtype: torch.dtype, token: str, level: str) -> None:
    for peak in (*PEAKS, 40.0):  # 1 - p down to 1e-12
        logits, top = confident(peak, dtype)
        want, gradient = exact(logits, top)
        leaf = logits.clone().requires_grad_()
        loss, stats = cfpo_kernels.cfpo_loss(
            leaf,
            asked(token, top),
            torch.zeros(N),
            entropy_coef=1.0,
            reduction="none",
            backend=backend,
            return_stats=True,
        )
        for got in (stats.entropy, -loss):
            assert (got.double() / want - 1).abs().max() < 3e-6
        loss.sum().backward()
        assert off_by(leaf.grad, -gradient) < (1e-5 if dtype == torch.float32 else 4.2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_entropy_does_not_change_log_p(dtype: torch.dtype, level: str) -> None:
    """Scored without, trained with one: r is exactly 1."""
    for peak in (*PEAKS, 3.0, 60.0):
        logits, top = confident(peak, dtype)
        for token in ("likeliest", "another", "second"):
            ids = asked(token, top)
            old = cfpo_kernels.token_logps(logits, ids)
            assert torch.equal(cfpo_kernels.token_logps(logits, ids, return_entropy=True)[0], old)
            _, stats = cfpo_kernels.cfpo_loss(
                logits, ids, torch.ones(N), old, entropy_coef=0.1, return_stats=True
            )
            assert torch.equal(stats.logps, old) and stats.ratio_max == 1 and stats.approx_kl == 0
