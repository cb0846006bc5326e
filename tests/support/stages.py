"""The stages of the kernels, called below the operators as the losses of shards call them."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from cfpo_kernels import backends, lse
from cfpo_kernels.backends.base import Backend, KernelRows


def kernels(logits: Tensor) -> Backend:
    """Those that backend="cpu" means here."""
    name = backends.resolve("cpu", logits.device, logits.dtype, logits.shape[-1])
    return backends.kernels(name)


def rows_of(logits: Tensor, token_ids: Tensor, temperature: Tensor, **more: object) -> KernelRows:
    return KernelRows(logits, token_ids, torch.ones(len(token_ids)), temperature)._replace(**more)


class Sums(NamedTuple):
    """What is left of stage 1."""

    logps: Tensor  # (N,)
    lse: Tensor  # (N, 2)
    entropy: Tensor  # (N,)

    @property
    def total(self) -> Tensor:
        """T * logsumexp(z / T), (N,)."""
        return self.lse.sum(-1)


def sums(rows: KernelRows, with_entropy: bool = True) -> Sums:
    n = len(rows.token_ids)
    entropy = torch.full((n,), 7.0)
    logps = torch.full((n,), 7.0, dtype=torch.float64)
    lse = torch.full((n, 2), 7.0, dtype=torch.float64)
    kernels(rows.logits).token_logps(
        rows, logps=logps, lse=lse, entropy=entropy if with_entropy else None
    )
    return Sums(logps, lse, entropy)


class Arrived(NamedTuple):
    """What stage 3 starts from, (N,) each but lse."""

    lse: Tensor  # (N, 2)
    entropy: Tensor
    dlogps: Tensor
    dentropy: Tensor | None


def gradient(rows: KernelRows, arrived: Arrived, inplace: bool = False) -> Tensor:
    """Written into memory beside which nothing may change; aligned where V is a multiple of 8."""
    logits = rows.logits
    n, v = logits.shape
    pad = 3 if v % 8 else 8
    memory = torch.full((n, v + 2 * pad), 7.0, dtype=logits.dtype)
    dlogits = memory[:, pad : v + pad]
    if inplace:
        rows = rows._replace(logits=dlogits.copy_(logits))
    kernels(logits).token_logps_backward(
        rows,
        lse=arrived.lse,
        entropy=None if arrived.dentropy is None else arrived.entropy,
        dlogps=arrived.dlogps,
        dentropy=arrived.dentropy,
        dlogits=dlogits,
    )
    assert (memory[:, :pad] == 7.0).all() and (memory[:, v + pad :] == 7.0).all()
    return dlogits.clone()


def exact(logits: Tensor, token_ids: Tensor, temperature: Tensor) -> Sums:
    """In float64, of the columns that are there."""
    z = logits.double() / temperature.double()[:, None]
    log_p = torch.log_softmax(z, -1)
    there = (token_ids >= 0) & (token_ids < z.shape[1])
    logps = log_p.gather(1, torch.where(there, token_ids, 0)[:, None]).squeeze(1)
    entropy = -(log_p.exp() * log_p.clamp(min=-1e300)).sum(-1)
    total = z.logsumexp(-1) * temperature.double()
    return Sums(torch.where(there, logps, -math.inf), as_pair(total), entropy)


def as_pair(total: Tensor) -> Tensor:
    return torch.stack([total, torch.zeros_like(total)], -1)


def borders(v: int, shards: int) -> list[tuple[int, int]]:
    """Uneven, at odd columns if there are any."""
    ends = [0, *sorted({v * k // shards // 2 * 2 + 1 for k in range(1, shards)} - {v}), v]
    return [(first, last) for first, last in pairwise(ends) if last > first]


def merge(shards: list[Sums], temperature: Tensor) -> Sums:
    """Of whole rows."""
    logps, parts, entropy = (torch.stack(x).double() for x in zip(*shards, strict=True))
    whole = lse.merge(parts, temperature.double())
    return Sums((logps - whole.gaps).amax(0), whole.lse, whole.entropy(entropy))


def temperatures(n: int) -> Tensor:
    return 0.6 + 0.8 * torch.rand(n, generator=torch.Generator().manual_seed(5))


def gradient64(
    logits: Tensor, ids: Tensor, t: Tensor, arrived: Arrived, softcap: float = 0.0
) -> Tensor:
    """By autograd, also through a softcap."""
    leaf = logits.double().requires_grad_()
    z = softcap * torch.tanh(leaf / softcap) if softcap else leaf
    log_p = torch.log_softmax(z / t.double()[:, None], -1)
    loss = log_p.gather(1, ids[:, None]).squeeze(1) * arrived.dlogps.double()
    if arrived.dentropy is not None:
        entropy = -(log_p.exp() * log_p.clamp(min=-1e300)).sum(-1)
        loss = loss + entropy * arrived.dentropy.double()
    (found,) = torch.autograd.grad(loss.sum(), leaf)
    return found


def check_gradient(
    got: Tensor, logits: Tensor, ids: Tensor, t: Tensor, arrived: Arrived, softcap: float = 0.0
) -> None:
    """Element by element."""
    want = gradient64(logits, ids, t, arrived, softcap)
    free, y = want, logits.double()
    if softcap:
        # The slope is 1 - (y / softcap)^2 in float32, so its error is one of 1.
        y = softcap * torch.tanh(y / softcap)
        free = gradient64(y, ids, t, arrived)
    log_p = torch.log_softmax(y / t.double()[:, None], -1)
    # The two terms of the entropy's gradient may cancel.
    cancels = torch.zeros_like(log_p)
    if arrived.dentropy is not None:
        terms = log_p.abs() + arrived.entropy.double()[:, None] + 1
        cancels = arrived.dentropy.double().abs()[:, None] * log_p.exp() * terms / t[:, None]
    ulp = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[logits.dtype]
    tiny = 6e-8 if logits.dtype == torch.float16 else 1e-15
    allowed = (1e-5 + ulp) * want.abs() + 1e-6 * free.abs() + 1e-5 * cancels + tiny
    worst = ((got.double() - want).abs() / allowed).max()
    assert worst <= 1, f"{worst:.2f} times the allowed error"
