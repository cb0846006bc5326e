"""What trainers log about a loss step; nothing here forces a device to synchronise."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .objectives import Objective
from .reference import kl_term


class CFPOStats(NamedTuple):
    """Detached statistics of a loss call, over the unmasked tokens. All float32.

    Attributes:
        logps: (...), log p of the tokens, in nats; 0 where masked.
        entropy: (...), entropy of the rows, in nats; 0 where masked.
        ratio_mean, ratio_max: 0-d, of r = exp(logp - old_logp).
        outside_fraction: 0-d, share of tokens with |r - 1| > epsilon.
        approx_kl: 0-d, mean of r - 1 - log r, an estimate of KL(old || pi).
        ref_kl: 0-d, mean of the chosen estimator against ref_logps; NaN without ref_logps.
        entropy_mean: 0-d.

    Means are NaN, and the maximum is -inf, where no token is unmasked.
    """

    logps: Tensor
    entropy: Tensor
    ratio_mean: Tensor
    ratio_max: Tensor
    outside_fraction: Tensor
    approx_kl: Tensor
    ref_kl: Tensor
    entropy_mean: Tensor


def collect_stats(
    logps: Tensor,
    entropy: Tensor,
    active: Tensor,
    old_logps: Tensor | None,
    ref_logps: Tensor | None,
    objective: Objective,
    kl_estimator: str,
    shape: torch.Size,
) -> CFPOStats:
    """Takes (N,) tensors; `shape` is that of the caller's tokens."""
    logps, entropy = logps.detach().float(), entropy.detach().float()
    count = active.sum()

    def mean(x: Tensor) -> Tensor:
        return torch.where(active, x, torch.zeros_like(x)).sum() / count

    log_ratio = torch.zeros_like(logps) if old_logps is None else logps - old_logps.float()
    excess = torch.expm1(log_ratio)
    low, high = objective.trust_region()
    if logps.numel() == 0:
        ratio_max = torch.full((), -torch.inf, device=logps.device)
    else:
        ratio_max = torch.where(active, excess + 1, -torch.inf).max()
    if ref_logps is None:
        ref_kl = torch.full((), torch.nan, device=logps.device)
    else:
        ref_kl = mean(kl_term(kl_estimator, logps, ref_logps.float()))
    return CFPOStats(
        logps=logps.reshape(shape),
        entropy=entropy.reshape(shape),
        ratio_mean=mean(excess + 1),
        ratio_max=ratio_max,
        outside_fraction=mean(((excess < -low) | (excess > high)).float()),
        approx_kl=mean(excess - log_ratio),
        ref_kl=ref_kl,
        entropy_mean=mean(entropy),
    )
