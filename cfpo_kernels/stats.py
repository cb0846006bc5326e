"""What trainers log about a loss step; nothing here forces a device to synchronise."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .formula import ONE_TOKEN, SHAPES, is_dropped, kl_term
from .inputs import LossSettings, Region, TokenInputs
from .two_pass import Beyond


class CFPOStats(NamedTuple):
    """Detached statistics of a loss call, over the unmasked tokens. All float32, on the device.

    Attributes:
        logps: (...), log p of the tokens, in nats; 0 where masked.
        entropy: (...), entropy of each token's distribution, in nats; 0 where masked, NaN from
            log-probs without `entropy`.
        ratio_mean, ratio_max: 0-d, of r = exp(logp - old_logp); 1 without old_logps.
        outside_fraction: 0-d, share of the tokens whose r is outside a region, whatever the sign of
            A. With log_ratio_bounds it is theirs; without, |r - 1| <= epsilon for CFPO
            (epsilon_high above 1), [1 - epsilon_low, 1 + epsilon_high] for PPOClip, GPPO and ASPO,
            [low, high] for CISPO and IcePop. NaN for those without bounds: SAPO, TOPR, Reinforce,
            PowerIS, DRO, a callable.
        approx_kl: 0-d, mean of r - 1 - log r, in nats: an estimate of KL(old || pi).
        ref_kl: 0-d, mean of the chosen estimator against ref_logps, in nats, not weighted by r; NaN
            without ref_logps.
        entropy_mean: 0-d, mean of `entropy`.
        dropped_fraction: 0-d, share, of the tokens with A != 0, of those whose policy term has no
            gradient (a drift aside): what trainers call the clip fraction. PPOClip: clipped on the
            side of A, or by the dual clip; GPPO: the same where its beta is 0; ASPO: clipped for
            A > 0 above, for A < 0 below; DPPO: beyond the bound on the side of A; IcePop, IPO:
            outside of both bounds; CFPO: beyond log_ratio_clip. 0 for the others, whose tokens all
            keep one; NaN for a callable, or an objective in Triton.

    With ratio_level="sequence" r is the sequence's, except in approx_kl.

    Means are NaN, and the maximum is -inf, where no token is unmasked. Nothing here forces a device
    to synchronise.

    Example:
        >>> r = torch.tensor([0.5, 1.0, 1.5, 1.1])
        >>> advantages = torch.tensor([1.0, 1.0, 1.0, 0.0])
        >>> old_logps = torch.full((4,), -2.0)
        >>> _, stats = cfpo_kernels.policy_loss_from_logps(
        ...     old_logps + r.log(), advantages, old_logps, objective=PPOClip(), return_stats=True
        ... )
        >>> stats.outside_fraction, stats.dropped_fraction  # r = 0.5 keeps its gradient: A > 0
        (tensor(0.5000), tensor(0.3333))
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
        ratio_max = logps.new_full((), -torch.inf)
    else:
        ratio_max = torch.where(active, excess + 1, -torch.inf).max()
    unknown = logps.new_full((), torch.nan)
    driven = active & (inputs.advantages != 0)
    if beyond.function is None and settings.shape.kind in SHAPES:
        is_out = driven & is_dropped(settings.shape, log_ratio, inputs)
        dropped = is_out.sum().float() / driven.sum()
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
