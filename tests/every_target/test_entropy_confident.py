"""The entropy of rows where one token has nearly all the mass, whichever token is asked for."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from oracle import DTYPES
from stages import Arrived, borders, gradient, merge, rows_of, sums
from torch import Tensor

import cfpo_kernels

pytestmark = [
    pytest.mark.nightly_on("triton-*", reason="a minute; test_triton_entropy.py"),
    pytest.mark.nightly_on("cuda-ptx-*", reason="40 s; rows in one block run on every commit"),
]

V = 33001  # enough to be split; rows begin anywhere
# Of the likeliest logit; the others have a standard deviation of 2: 1 - p from 0.1 to 1e-17.
PEAKS = (14.0, 18.0, 25.0, 32.0, 40.0, 52.0)
ASKED = ("likeliest", "another", "second")
# Where a row's, a vector's or a segment's first and last columns are; and anywhere.
COLUMNS = (0, 5, 1023, 1024, V - 1, 511, 512, 2047, 8191, 8192, 12345, 20480, V - 3, 30000, 7)


class Rows(NamedTuple):
    """Each likeliest logit with each token asked for."""

    logits: Tensor  # (n, V)
    top: Tensor  # (n,) column of the likeliest
    asked: Tensor  # (n,)
    peak: Tensor  # (n,)


def confident(dtype: torch.dtype, peaks: tuple[float, ...] = PEAKS) -> Rows:
    n = len(peaks) * len(ASKED)
    g = torch.Generator().manual_seed(11)
    logits = torch.randn(n, V, generator=g) * 2
    top = torch.tensor([COLUMNS[i % len(COLUMNS)] for i in range(n)])
    peak = torch.tensor(peaks).repeat_interleave(len(ASKED))
    logits.scatter_(1, top[:, None], peak[:, None])
    second = (top + 14000) % V  # in another segment, half as likely as the rest
    logits.scatter_(1, second[:, None], 11.2)
    choice = torch.arange(n) % len(ASKED)
    asked = torch.where(choice == 0, top, torch.where(choice == 1, (top + 1) % V, second))
    return Rows(logits.to(dtype), top, asked, peak)


def exact(logits: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """H (n,) and dH/dlogits (n, V) in float64 without a small difference."""
    d = logits.double() - logits.double().gather(1, top[:, None])
    e = d.exp().scatter(1, top[:, None], 0.0)
    s = e.sum(-1)
    entropy = torch.log1p(s) - (d * e).sum(-1) / (1 + s)
    p = d.exp() / (1 + s)[:, None]
    return entropy, -p * (d - torch.log1p(s)[:, None] + entropy[:, None])


def check_gradient(got: Tensor, want: Tensor, top: Tensor) -> None:
    """Of each row by its norm, and the likeliest token's by itself."""
    ulp = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[got.dtype]
    tiny = 2e-8 * V**0.5 if got.dtype == torch.float16 else 0.0  # below, it has no numbers
    got = got.double()
    error, norm = (got - want).norm(dim=-1), want.norm(dim=-1)
    assert (error <= (1e-5 + 1.05 * ulp) * norm + tiny).all(), error / norm
    at = top[:, None]
    error = (got.gather(1, at) - want.gather(1, at)).abs().squeeze(1)
    assert (error <= (1e-5 + 1.25 * ulp) * want.gather(1, at).abs().squeeze(1) + tiny).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scored(dtype: torch.dtype) -> None:
    rows = confident(dtype)
    want, its_gradient = exact(rows.logits, rows.top)
    leaf = rows.logits.clone().requires_grad_()
    _, entropy = cfpo_kernels.token_logps(leaf, rows.asked, return_entropy=True)
    assert ((entropy.double() / want - 1).abs() < 3e-6).all()
    entropy.sum().backward()
    assert leaf.grad is not None
    check_gradient(leaf.grad, its_gradient, rows.top)


@pytest.mark.parametrize("late", [False, True], ids=["", "late"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused(dtype: torch.dtype, late: bool) -> None:
    """Late: the logits lie otherwise in their vectors than the gradient."""
    rows = confident(dtype)
    n = len(rows.top)
    want, its_gradient = exact(rows.logits, rows.top)
    leaf = rows.logits.clone()
    if late:
        leaf = torch.zeros(n * V + 3, dtype=dtype)[3:].view(n, V).copy_(rows.logits)
    leaf.requires_grad_()
    loss, stats = cfpo_kernels.cfpo_loss(
        leaf, rows.asked, torch.zeros(n), entropy_coef=1.0, reduction="none", return_stats=True
    )
    for got in (stats.entropy, -loss):
        assert ((got.double() / want - 1).abs() < 3e-6).all()
    loss.sum().backward()
    assert leaf.grad is not None
    check_gradient(leaf.grad, -its_gradient, rows.top)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_entropy_does_not_change_log_p(dtype: torch.dtype) -> None:
    """Scored without, trained with one: r is exactly 1."""
    rows = confident(dtype, (3.0, 18.0, 40.0, 60.0))
    old = cfpo_kernels.token_logps(rows.logits, rows.asked)
    scored, _ = cfpo_kernels.token_logps(rows.logits, rows.asked, return_entropy=True)
    assert torch.equal(scored, old)
    _, stats = cfpo_kernels.cfpo_loss(
        rows.logits, rows.asked, torch.ones(len(old)), old, entropy_coef=0.1, return_stats=True
    )
    assert torch.equal(stats.logps, old) and stats.ratio_max == 1 and stats.approx_kl == 0


def of_log_p(rows: Rows) -> tuple[Tensor, Tensor]:
    """log p of the likeliest and its gradient, in float64 without a small difference."""
    e = (rows.logits.double() - rows.logits.double().gather(1, rows.top[:, None])).exp()
    s = e.scatter(1, rows.top[:, None], 0.0).sum(-1, keepdim=True)
    return -s.log1p().squeeze(1), -(e / (1 + s)).scatter(1, rows.top[:, None], -s / (1 + s))


@pytest.mark.not_on("reference", reason="torch's log_softmax in float32")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_p_of_the_likeliest(dtype: torch.dtype) -> None:
    """Its gradient, 1 - p, is found again from lse."""
    rows = confident(dtype)
    want, its_gradient = of_log_p(rows)
    leaf = rows.logits.clone().requires_grad_()
    logps = cfpo_kernels.token_logps(leaf, rows.top)
    assert ((logps.double() / want - 1).abs() < 3e-6).all()
    logps.sum().backward()
    assert leaf.grad is not None
    check_gradient(leaf.grad, its_gradient, rows.top)


@pytest.mark.not_on("reference", reason="it has no kernels")
@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
def test_shards(dtype: torch.dtype) -> None:
    """The shard that has the likeliest token knows the rest of itself; the others are below it."""
    rows = confident(dtype)
    t = torch.ones(len(rows.top))
    want, its_gradient = exact(rows.logits, rows.top)
    pieces = [
        rows_of(rows.logits[:, first:last], rows.asked - first, t, sharded=True)
        for first, last in borders(V, 3)
    ]
    got = merge([sums(piece) for piece in pieces], t)
    assert ((got.entropy / want - 1).abs() < 3e-6).all()
    arrived = Arrived(got.lse, got.entropy.float(), 0 * t, t)
    for inplace in (False, True):
        parts = torch.cat([gradient(piece, arrived, inplace) for piece in pieces], 1)
        check_gradient(parts, its_gradient, rows.top)

    want, its_gradient = of_log_p(rows)
    likeliest = rows.asked == rows.top
    assert ((got.logps / want - 1).abs()[likeliest] < 3e-6).all()
    arrived = Arrived(got.lse, got.entropy.float(), t, None)
    parts = torch.cat([gradient(piece, arrived) for piece in pieces], 1)
    check_gradient(parts[likeliest], its_gradient[likeliest], rows.top[likeliest])
