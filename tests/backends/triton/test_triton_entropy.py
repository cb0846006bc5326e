"""The entropy of rows where one token, the peak, has nearly all the mass, and the same bits of it
from whole rows and from rows that several programs share."""

from __future__ import annotations

import pytest
import torch
from targets import Target
from torch import Tensor

import cfpo_kernels
from cfpo_kernels.backends import triton as backend
from cfpo_kernels.triton_kernels import config

pytestmark = pytest.mark.only_on("triton-*", reason="its tiles; the others are in every_target")

# Of the likeliest logit, over others of a standard deviation of 2: 1 - p down to 1e-9.
PEAKS = (12.0, 20.0, 29.0)


def confident(v: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (9, v), the likeliest column of each row, and the one that is asked for: that one,
    the next, or a second likely one."""
    g = torch.Generator().manual_seed(v)
    logits = torch.randn(9, v, generator=g) * 2
    top = torch.tensor([0, 5, v // 2, v - 1, 7, v // 3, 511, v - 3, 2]) % v
    logits.scatter_(1, top[:, None], torch.tensor(PEAKS).repeat(3)[:, None])
    second = (top + v // 2) % v
    logits.scatter_(1, second[:, None], 8.0)
    asked = torch.stack([top, (top + 1) % v, second]).gather(0, torch.arange(9)[None] // 3)[0]
    return logits.to(dtype), top, asked


def exact(logits: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """H (n,) and dH/dlogits (n, v) in float64, without a small difference."""
    d = logits.double() - logits.double().gather(1, top[:, None])
    e = d.exp().scatter(1, top[:, None], 0.0)
    s = e.sum(-1)
    entropy = torch.log1p(s) - (d * e).sum(-1) / (1 + s)
    return entropy, -(d.exp() / (1 + s)[:, None]) * (d - (torch.log1p(s) - entropy)[:, None])


def check_gradient(got: Tensor, want: Tensor, top: Tensor) -> None:
    allowed = {torch.float32: 1e-5, torch.bfloat16: 4.2e-3}[got.dtype]
    assert ((got - want).norm(dim=-1) < allowed * want.norm(dim=-1)).all()
    at = top[:, None]
    assert ((got.double().gather(1, at) / want.gather(1, at) - 1).abs() < 1.2 * allowed).all()


@pytest.mark.parametrize("v", [1001, pytest.param(33000, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_confident_rows(dtype: torch.dtype, v: int, target: Target) -> None:
    logits, top, asked = confident(v, dtype)
    want, gradient = exact(logits, top)
    leaf = logits.clone().requires_grad_()
    _, entropy = cfpo_kernels.token_logps(leaf, asked, return_entropy=True)
    assert ((entropy.double() / want - 1).abs() < 3e-6).all()
    entropy.sum().backward()
    assert leaf.grad is not None
    check_gradient(leaf.grad, gradient, top)

    leaf = logits.clone().requires_grad_()
    loss, stats = cfpo_kernels.cfpo_loss(
        leaf, asked, torch.zeros(9), entropy_coef=1.0, reduction="none", return_stats=True
    )
    for got in (stats.entropy, -loss):
        assert ((got.double() / want - 1).abs() < 3e-6).all()
    assert torch.equal(stats.logps, cfpo_kernels.token_logps(logits, asked))
    loss.sum().backward()
    assert leaf.grad is not None
    check_gradient(leaf.grad, -gradient, top)


@pytest.mark.only_on("triton-interpreted", reason="it counts programs")
def test_shared_rows_have_the_same_bits(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two segments; the peak in either, and among the columns of the guess."""
    v = config.TABLE[2][-1][1].segment + 33
    logits, _, asked = confident(v, torch.bfloat16)
    logits, asked = logits[3:6], asked[3:6]
    found = []
    for processors in (1, 64):
        device = config.Device(processors)
        monkeypatch.setattr(backend, "_device", lambda _, device=device: device)
        leaf = logits.clone().requires_grad_()
        loss, stats = cfpo_kernels.cfpo_loss(
            leaf, asked, torch.ones(3), entropy_coef=1.0, reduction="none", return_stats=True
        )
        loss.sum().backward()
        assert leaf.grad is not None
        found.append(torch.cat([leaf.grad.float().flatten(), loss.detach(), stats.entropy]))
    assert torch.equal(*found)
