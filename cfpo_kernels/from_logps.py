"""The same losses for callers that have log-probs already, elementwise and in plain torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import formula, validation
from .inputs import LogRatioBounds
from .objectives import CFPO
from .stats import CFPOStats, collect_stats
from .validation import AnyObjective


def policy_loss_from_logps(
    logps: Tensor,
    advantages: Tensor,
    old_logps: Tensor | None = None,
    *,
    objective: AnyObjective,
    entropy: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "token-mean",
    normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    token_weights: Tensor | None = None,
    ref_logps: Tensor | None = None,
    log_ratio_bounds: LogRatioBounds | None = None,
    ratio_level: str = "token",
    sequence_group: Any = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    kl_ratio_weighted: bool = False,
    entropy_coef: float = 0.0,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, CFPOStats]:
    """:func:`cfpo_loss_from_logps` with any objective.

    Args:
        objective: see :func:`policy_loss`.
        others: see :func:`cfpo_loss_from_logps`.

    Returns, raises, memory: see :func:`cfpo_loss_from_logps`.
    """
    chosen = validation.check_objective(objective)
    validation.check_formula(chosen, False)
    validation.check_flag("return_stats", return_stats)
    rows = validation.check_logps(logps, entropy=entropy, mask=mask)
    with torch.no_grad():
        terms = validation.check_loss_terms(
            rows,
            chosen,
            advantages=advantages,
            old_logps=old_logps,
            reduction=reduction,
            normalizer=normalizer,
            cu_seqlens=cu_seqlens,
            token_weights=token_weights,
            ref_logps=ref_logps,
            log_ratio_bounds=log_ratio_bounds,
            ratio_level=ratio_level,
            sequence_group=sequence_group,
            kl_coef=kl_coef,
            kl_estimator=kl_estimator,
            kl_ratio_weighted=kl_ratio_weighted,
            entropy_coef=entropy_coef,
        )
    if terms.settings.needs_entropy and rows.entropy is None:
        raise ValueError(
            f"entropy must be given where entropy_coef is not 0, got entropy_coef={entropy_coef}"
        )
    if terms.beyond.needs_entropy and rows.entropy is None:
        raise ValueError("entropy must be given for an objective with needs_entropy")
    loss = formula.loss_of_logps(
        rows.logps, rows.entropy, terms.weights, terms.inputs, terms.settings, terms.beyond
    )
    loss = loss.reshape(rows.shape) if reduction == "none" else loss.sum()
    if not return_stats:
        return loss
    with torch.no_grad():
        unknown = torch.full_like(rows.logps, torch.nan)
        stats = collect_stats(
            torch.where(rows.active, rows.logps, 0.0),
            torch.where(rows.active, unknown if rows.entropy is None else rows.entropy, 0.0),
            rows.active,
            terms.inputs,
            terms.settings,
            terms.region,
            rows.shape,
            terms.beyond,
        )
    return loss, stats


def cfpo_loss_from_logps(
    logps: Tensor,
    advantages: Tensor,
    old_logps: Tensor | None = None,
    *,
    entropy: Tensor | None = None,
    mask: Tensor | None = None,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    reduction: str = "token-mean",
    normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    token_weights: Tensor | None = None,
    ref_logps: Tensor | None = None,
    log_ratio_bounds: LogRatioBounds | None = None,
    ratio_level: str = "token",
    sequence_group: Any = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    kl_ratio_weighted: bool = False,
    entropy_coef: float = 0.0,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, CFPOStats]:
    """The loss of :func:`cfpo_loss`, from the log-probs of the tokens instead of their logits.

    ::

        loss = sum_i w_i (token_weight_i policy_i + kl_coef KL_i - entropy_coef H_i)

    For trainers that compute log-probs in one place and the loss in another. With
    :func:`token_logps` in the first place it costs one more read of the logits than
    :func:`cfpo_loss`, and no more V-sized memory.

    Args:
        logps: (...) floating point, log p of the tokens in nats; differentiable. Numbers of 16 bits
            are accepted and widened, but their rounding is a ratio's noise: a bfloat16 log p of -5
            is known to 0.016.
        entropy: (...) floating point, entropy of each token's distribution in nats; differentiable.
            Needed where entropy_coef is not 0.
        others: see :func:`cfpo_loss`; shapes (...) are that of logps, (B, T) or packed (N,).

    Returns:
        A 0-d float32 loss, or (...) for reduction="none" (float64 for float64 logps); with
        return_stats, a pair with :class:`CFPOStats`, whose entropies are NaN without `entropy`.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, device or value.

    Memory: O(N). Plain torch on any device, differentiable twice.

    Source: CFPO, arXiv 2601.22801; docs/maths.md derives the gradient.
    """
    return policy_loss_from_logps(
        logps,
        advantages,
        old_logps,
        objective=CFPO(epsilon, epsilon_high=epsilon_high),
        entropy=entropy,
        mask=mask,
        reduction=reduction,
        normalizer=normalizer,
        cu_seqlens=cu_seqlens,
        token_weights=token_weights,
        ref_logps=ref_logps,
        log_ratio_bounds=log_ratio_bounds,
        ratio_level=ratio_level,
        sequence_group=sequence_group,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        kl_ratio_weighted=kl_ratio_weighted,
        entropy_coef=entropy_coef,
        return_stats=return_stats,
    )
