"""What trainers log about a loss step; nothing here forces a device to synchronise."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .formula import ONE_TOKEN, SHAPES, is_dropped, kl_term
from .inputs import LossSettings, Region, TokenInputs
from .two_pass import Beyond


class CFPOStats(NamedTuple):
    """Detached statistics of a loss call, over the unmasked tokens. All float32.

    Attributes:
        logps: (...), log p of the tokens, in nats; 0 where masked.
        entropy: (...), entropy of the rows, in nats; 0 where masked.
        ratio_mean, ratio_max: 0-d, of r = exp(logp - old_logp).
        outside_fraction: 0-d, share of tokens with log r outside log_ratio_bounds or else the
            objective's own bounds: |r - 1| > epsilon for CFPO, the clip range for PPOClip; NaN for
            an objective without bounds.
        approx_kl: 0-d, mean of r - 1 - log r, an estimate of KL(old || pi).
        ref_kl: 0-d, mean of the chosen estimator against ref_logps; NaN without ref_logps.
        entropy_mean: 0-d.
        dropped_fraction: 0-d, share of tokens with an advantage other than 0 that the objective
            gives no gradient: what trainers call the clip fraction; NaN for a callable.

    With ratio_level="sequence" r is the sequence's, except in approx_kl.

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
    dropped_fraction: Tensor


def collect_stats(
    logps: Tensor,
    entropy: Tensor,
    active: Tensor,
    inputs: TokenInputs,
    settings: LossSettings,
    region: Region | None,
    shape: torch.Size,
    beyond: Beyond = ONE_TOKEN,
) -> CFPOStats:
    """Takes (N,) tensors; `shape` is that of the caller's tokens."""
    logps, entropy = logps.detach().float(), entropy.detach().float()
    count = active.sum()

    def mean(x: Tensor) -> Tensor:
        return torch.where(active, x, torch.zeros_like(x)).sum() / count

    inputs = inputs.each(lambda x: x.float())
    old_logps, ref_logps = inputs.old_logps, inputs.ref_logps
    log_ratio = torch.zeros_like(logps) if old_logps is None else logps - old_logps
    of_tokens = torch.expm1(log_ratio) - log_ratio
    if beyond.ratio is not None:
        log_ratio = beyond.ratio.mean(log_ratio, active)
    excess = torch.expm1(log_ratio)
    if logps.numel() == 0:
        ratio_max = torch.full((), -torch.inf, device=logps.device)
    else:
        ratio_max = torch.where(active, excess + 1, -torch.inf).max()
    unknown = torch.full((), torch.nan, device=logps.device)
    driven = active & (inputs.advantages != 0)
    if beyond.function is None and settings.shape.kind in SHAPES:
        dropped = (driven & is_dropped(settings.shape, log_ratio, inputs)).sum() / driven.sum()
    else:
        dropped = unknown
    return CFPOStats(
        logps=logps.reshape(shape),
        entropy=entropy.reshape(shape),
        ratio_mean=mean(excess + 1),
        ratio_max=ratio_max,
        outside_fraction=unknown
        if region is None
        else mean(((log_ratio < region[0]) | (log_ratio > region[1])).float()),
        approx_kl=mean(of_tokens),
        ref_kl=unknown
        if ref_logps is None
        else mean(kl_term(settings.kl_estimator, logps, ref_logps)),
        entropy_mean=mean(entropy),
        dropped_fraction=dropped,
    )
