"""The same losses for callers that have log-probs already: stage 2 alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import validation
from .inputs import LogRatioBounds
from .objectives import CFPO
from .stage_two import token_losses
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
    """The loss of :func:`policy_loss`, from the log-probs of the tokens instead of their logits.

    ::

        loss = sum_i w_i (token_weight_i policy_i + kl_coef KL_i - entropy_coef H_i)

    where ``policy`` is the objective's loss of a token, H its entropy, and the w_i are made of
    mask, reduction and normalizer. Elementwise, on any device.

    Args:
        logps: (...) floating point, log p of the tokens in nats; differentiable. Every (...) is
            their shape: (B, T), or packed (N,).
        advantages: (...) float; or one a sequence: (B,) or (B, 1) for (B, T), (B,) with cu_seqlens.
        old_logps: (...) float, log p of the tokens when they were sampled, in nats. None:
            on-policy, r = 1.
        objective: a named one, such as ``CFPO(epsilon=0.2)`` or ``PPOClip(0.2, 0.28)``; or a
            callable that takes :class:`TokenTerms` and returns a loss a token (...). Not one that
            is written in Triton.
        entropy: (...) floating point, entropy of each token's distribution in nats; differentiable.
            Needed where entropy_coef is not 0, or the callable has ``needs_entropy = True``.
        mask: (...) bool or number; where it is 0 the token is not part of the loss, and none of its
            numbers is looked at. Not a weight: any number but 0 counts as 1. None: all tokens.
        reduction: "token-mean" divides by the number of unmasked tokens; "seq-mean-token-mean" is
            the mean over sequences of their token means, "seq-mean-token-sum" that of their sums;
            "sum"; "none" returns a loss a token. Sequences without unmasked tokens do not count.
        normalizer: positive number or 0-d tensor in place of the denominator: of the number of
            tokens, of sequences for the seq-* reductions, of 1 otherwise.
        cu_seqlens: (B + 1,) int64 or int32, bounds of the sequences of packed (N,) log-probs.
        token_weights: (...) float, factors of the policy term, detached.
        ref_logps: (...) float, log p under the reference model, in nats; needed for a KL term.
        log_ratio_bounds: a pair (low, high) of bounds on log r, in nats, each a number, a 0-d
            tensor or (...) float, in place of the objective's own; what that means is said there.
        ratio_level: "token", or "sequence": a token's log r is the mean of its sequence's (GSPO,
            arXiv 2507.18071), and bounds are on that. With advantages by token, a token's loss
            moves its own log p only (GSPO-token).
        sequence_group: a process group over which each sequence is split, for "sequence".
        kl_coef: factor of the KL estimate against ref_logps.
        kl_estimator: with d = ref_logp - logp, "k1": -d, "k2": d^2 / 2, "k3": e^d - d - 1; "k1+",
            "k3+": their value with the gradient of k2.
        kl_ratio_weighted: multiply the KL estimate by r, which is differentiated too; by the
            sequence's with ratio_level="sequence", differentiated by the token's own log p.
        entropy_coef: factor of the entropy bonus, in nats.
        return_stats: also return :class:`CFPOStats`, whose entropies are NaN without `entropy`.

    Returns:
        A 0-d float32 loss, or (...) for reduction="none" (float64 for float64 logps); with
        return_stats, a pair with the statistics.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, device or value.

    Memory: O(N). Differentiable twice.

    Source: the objective's.

    Example:
        >>> logps = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
        >>> old_logps = torch.tensor([-1.0, -2.5, -0.5])
        >>> loss = policy_loss_from_logps(logps, torch.ones(3), old_logps, objective=PPOClip())
        >>> loss.backward()
        >>> logps.grad  # the second token's ratio is clipped
        tensor([-0.3333,  0.0000, -0.3333])
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
    loss = token_losses(
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

    Memory: O(N). On any device, differentiable twice.

    Source: CFPO, arXiv 2601.22801; docs/maths.md derives the gradient.

    Example:
        >>> logps = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
        >>> old_logps = torch.tensor([-1.0, -2.5, -0.5])
        >>> cfpo_loss_from_logps(logps, torch.ones(3), old_logps).backward()
        >>> logps.grad  # the second token's ratio is beyond 1.2, and is pulled back
        tensor([-0.3333,  1.2330, -0.3333])
    """
    return policy_loss_from_logps(
        logps,
        advantages,
        old_logps,
        objective=CFPO(epsilon=epsilon, epsilon_high=epsilon_high),
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
