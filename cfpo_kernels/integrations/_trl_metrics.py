"""What TRL logs about a loss, with the ratio in place of the clip ratio."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._trl_loss import LossTerms


def _metrics(trainer: Any) -> Any:
    return trainer._metrics["train" if trainer.model.training else "eval"]


def log_loss(trainer: Any, terms: LossTerms) -> None:
    """Appends kl, entropy and ratio/*, over the unmasked tokens of all processes."""
    metrics = _metrics(trainer)
    stats, count = terms.stats, terms.mask.sum()
    means = torch.stack(
        [stats.entropy_mean, stats.ratio_mean, stats.outside_fraction, stats.ref_kl]
    )
    sums = torch.where(count > 0, means * count, 0.0)
    totals = trainer.accelerator.reduce(torch.cat([sums, count[None].to(sums)]), reduction="sum")
    entropy, ratio, outside, kl = (totals[:-1] / totals[-1].clamp(min=1)).tolist()
    if trainer.beta != 0:
        metrics["kl"].append(kl)
    metrics["entropy"].append(entropy)
    metrics["ratio/mean"].append(ratio)
    metrics["ratio/outside_epsilon"].append(outside)
    largest = trainer.accelerator.gather(stats.ratio_max).max().item()
    # -inf where no process has a token; TRL's log leaves NaN out of its means.
    metrics["ratio/max"].append(largest if largest >= 0 else float("nan"))


def log_entropy_bonus(trainer: Any, terms: LossTerms) -> None:
    """policy_loss and entropy_coef; moves TRL's adaptive coefficient at the end of a step."""
    if not trainer._entropy_bonus_enabled:
        return
    metrics = _metrics(trainer)
    metrics["policy_loss"].append(trainer.accelerator.gather(terms.policy_loss).nanmean().item())
    if not trainer.model.training:
        return
    if trainer.use_adaptive_entropy:
        _accumulate_entropy(trainer, terms)
        if trainer.accelerator.sync_gradients:
            _adapt_entropy_coefficient(trainer)
    if trainer.accelerator.sync_gradients:
        metrics["entropy_coef"].append(trainer.entropy_coef)


def _accumulate_entropy(trainer: Any, terms: LossTerms) -> None:
    entropy = torch.where(terms.bonus_mask, terms.stats.entropy, 0.0).sum()
    window = torch.stack([entropy, terms.bonus_mask.sum().to(entropy)])
    if trainer._entropy_window_stats is not None:
        window = window + trainer._entropy_window_stats
    trainer._entropy_window_stats = window


def _adapt_entropy_coefficient(trainer: Any) -> None:
    args = trainer.args
    total, count = trainer.accelerator.reduce(
        trainer._entropy_window_stats, reduction="sum"
    ).tolist()
    entropy = total / max(count, 1.0)
    if entropy <= args.entropy_target:
        moved = min(trainer.entropy_coef + args.entropy_coef_delta, args.entropy_coef_max)
    else:
        moved = max(trainer.entropy_coef - args.entropy_coef_delta, args.entropy_coef_min)
    trainer.entropy_coef = moved
    trainer._last_world_entropy = entropy
    trainer._entropy_window_stats = None


def log_aux_loss(trainer: Any, aux_loss: Tensor) -> None:
    metrics = _metrics(trainer)
    metrics["aux_loss"].append(trainer.accelerator.gather_for_metrics(aux_loss).mean().item())
