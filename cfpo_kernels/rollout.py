"""Weights for samples of an inference engine whose probabilities are not quite the trainer's."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .validation import scalars, tensors
from .validation.sequences import check_sequences
from .validation.types import PerToken
from .weights import suffix_sums

LEVELS = ("token", "sequence", "geometric")
MODES = tuple(f"{level}_{action}" for level in LEVELS for action in ("truncate", "mask"))
LARGEST_LOG_RATIO = 20.0


def rollout_weights(
    old_logps: Tensor,
    rollout_logps: Tensor,
    mask: Tensor | None = None,
    *,
    mode: str,
    low: float | Tensor | None,
    high: float | Tensor | None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Importance weights of tokens that another program sampled, for ``token_weights=``, ``mask=``.

    The ratio is ``exp(old_logp - rollout_logp)`` of a token, or ``exp`` of the sum ("sequence") or
    the mean ("geometric") of these differences over its sequence; "truncate" clamps it to [low,
    high], "mask" makes the weight 0 outside and leaves it as it is inside, bounds included. Both
    log-probs are of the policy that sampled, by the trainer and by the engine: constants.

    Args:
        old_logps: (..., T) floating point, log p of the tokens by the trainer, in nats; packed (N,)
            with cu_seqlens, or any shape for the modes of a token.
        rollout_logps: (...), log p by the engine that sampled. Where it is NaN, which vLLM returns
            for tokens that it did not score, the token's log ratio is 0, as in TRL.
        mask: (...) bool or number; where it is 0 no number of the token is looked at.
        mode: "token_truncate" (truncated importance sampling, TIS), "token_mask" (MIS, IcePop),
            "sequence_truncate", "sequence_mask" (TRL's default, with high=3.0),
            "geometric_truncate" or "geometric_mask".
        low, high: numbers or 0-d tensors, the least and largest ratio, or None for none. A log
            ratio beyond +-20 counts as +-20, as in verl.
        cu_seqlens: (B + 1,) int, bounds of the sequences in packed tokens.

    Returns:
        weights: (...) float32, or float64 for float64 old_logps; detached; 0 where the token is
            masked or dropped. NaN where old_logps is.
        mask: (...) bool, where mask was not 0 and nothing was dropped. With it dropped tokens are
            not counted by the loss's denominator, and have no KL term and no entropy bonus; with
            the mask as it was they only lose their policy term, as in TRL and verl.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, device or value.

    Memory: O(N), float64 inside; no device sync.

    Source: TIS as in AIPO, arXiv 2505.24034; IcePop, arXiv 2510.18855.

    Example:
        >>> old = torch.tensor([[-1.0, -2.0, -1.0]])
        >>> rollout = torch.tensor([[-1.0, -3.0, -1.5]])
        >>> rollout_weights(old, rollout, mode="token_mask", low=0.5, high=2.0)
        (tensor([[1.0000, 0.0000, 1.6487]]), tensor([[ True, False,  True]]))
    """
    chosen = scalars.check_choice("mode", mode, MODES)
    level, action = chosen.split("_")
    source = tensors.floats("old_logps", old_logps)
    engine = tensors.same_shape("rollout_logps", rollout_logps, "old_logps", source)
    least, most = _bounds(low, high, source.device)
    tokens = PerToken("old_logps", source)
    with torch.no_grad():
        if level == "token" and cu_seqlens is None:
            active = tensors.active_rows(mask, tokens)
        else:
            batch = check_sequences("old_logps", source, mask, cu_seqlens)
            active = batch.active
        engine = engine.detach().reshape(-1)
        log_ratio = source.detach().reshape(-1).double() - engine
        log_ratio = torch.where(active & ~engine.isnan(), log_ratio, 0.0)
        if level != "token":
            starts = batch.starts()
            log_ratio = suffix_sums(log_ratio, batch.index, batch.longest)[starts]
        if level == "geometric":
            counts = suffix_sums(active.double(), batch.index, batch.longest)[starts]
            log_ratio = log_ratio / counts.clamp(min=1)
        log_ratio = log_ratio.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
        ratio = log_ratio.exp()
        if action == "truncate":
            ratio = ratio.clamp(least, most)
        else:
            # What is outside, not what is not inside: a NaN is to be seen, not dropped.
            active = active & ~((log_ratio < least.log()) | (log_ratio > most.log()))
        weights = torch.where(active, ratio, 0.0)
        return weights.to(tokens.dtype).reshape(source.shape), active.reshape(source.shape)


def _bounds(low: object, high: object, device: torch.device) -> tuple[Tensor, Tensor]:
    """0-d tensors, open where None."""
    accepted = "a number, 0 or more, or None"
    least = 0.0 if low is None else scalars.number("low", low, accepted, lambda x: x >= 0)
    most = math.inf if high is None else scalars.number("high", high, accepted, lambda x: x >= 0)
    if not isinstance(least, Tensor) and not isinstance(most, Tensor) and least > most:
        raise ValueError(f"low must be at most high, got low={low}, high={high}")
    return scalars.on_device(least, device), scalars.on_device(most, device)
