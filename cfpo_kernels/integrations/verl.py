"""CFPO as a policy loss of verl: ``actor_rollout_ref.actor.policy_loss.loss_mode=cfpo``.

Importing this module registers the loss. verl does that itself, in every process: it imports what
installed packages announce in the entry-point group "verl.plugins", and this one announces it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..from_logps import policy_loss_from_logps
from ..objectives import CFPO
from ._logps import entropy_of_rows, logps_of_labels, replace_everywhere

try:
    import verl.utils.torch_functional as verl_functional
    from verl.trainer.ppo.core_algos import agg_loss, register_policy_loss
    from verl.workers.config import ActorConfig
except ImportError as error:
    raise ImportError(
        "cfpo_kernels.integrations.verl needs verl: pip install 'verl>=0.9.1'"
    ) from error

__all__ = [
    "compute_policy_loss_cfpo",
    "entropy_from_logits",
    "logprobs_from_logits",
    "use_fused_logprobs",
]

# verl's own losses clamp log r to this range before they take its exponential.
LOG_RATIO_CLIP = 20.0


def _objective(config: Any) -> CFPO:
    if config is None:
        raise ValueError(
            "config must be verl's actor configuration, got None: CFPO takes its epsilon from "
            "actor.clip_ratio"
        )
    # verl fills in its default for the two sides where only clip_ratio was set.
    unset = (None, ActorConfig.clip_ratio_low)
    low, high = (
        config.clip_ratio if config.get(side) in unset else config.get(side)
        for side in ("clip_ratio_low", "clip_ratio_high")
    )
    return CFPO(low, log_ratio_clip=LOG_RATIO_CLIP, epsilon_high=high)


@register_policy_loss("cfpo")
def compute_policy_loss_cfpo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """The CFPO loss as verl calls its policy losses, aggregated by verl's own ``agg_loss``.

    Args:
        old_log_prob, log_prob, advantages: (B, T) float, log-probs in nats.
        response_mask: (B, T); 0 = not part of the loss, whatever the other arguments hold there.
        loss_agg_mode: whatever verl's ``agg_loss`` takes, such as "token-mean".
        config: verl's ActorConfig; ``clip_ratio`` is CFPO's epsilon, ``clip_ratio_low`` and
            ``clip_ratio_high`` that for A < 0 and for A > 0, where they are not verl's default.
        rollout_is_weights: (B, T) or None, weights of the rollout correction.

    Returns:
        The 0-d loss, and verl's ``actor/ppo_kl`` with statistics of the ratio, which stand in the
        place of verl's clip fraction: CFPO clips nothing.

    Raises:
        ValueError: no config, or an unknown loss_agg_mode.
    """
    loss, stats = policy_loss_from_logps(
        log_prob,
        advantages,
        old_log_prob,
        objective=_objective(config),
        mask=response_mask,
        token_weights=rollout_is_weights,
        reduction="none",
        return_stats=True,
    )
    try:
        aggregated = agg_loss(
            loss_mat=loss,
            loss_mask=response_mask,
            loss_agg_mode=loss_agg_mode,
            **config.global_batch_info,
        )
    except ValueError as error:
        if loss_agg_mode in str(error):
            raise ValueError(
                f"loss_agg_mode={loss_agg_mode!r} is unknown to verl's agg_loss: set "
                "actor.loss_agg_mode to 'token-mean', 'seq-mean-token-sum', 'seq-mean-token-mean' "
                "or another one of verl's"
            ) from error
        raise
    with torch.no_grad():
        kl = verl_functional.masked_mean(
            (old_log_prob - log_prob).clamp(-LOG_RATIO_CLIP, LOG_RATIO_CLIP), response_mask
        )
        # As verl's means, 0 where no token counts.
        values = torch.stack([kl, stats.ratio_mean, stats.ratio_max, stats.outside_fraction])
        values = torch.where(response_mask.any(), values, 0.0)
    names = ("ppo_kl", "ratio_mean", "ratio_max", "ratio_outside_fraction")
    metrics = zip(names, values.tolist(), strict=True)  # one wait for the device, not four
    return aggregated, {f"actor/{name}": value for name, value in metrics}


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """verl's function of this name over :func:`cfpo_kernels.token_logps`.

    Args:
        logits: (..., V) float32, bfloat16 or float16, already divided by the temperature.
        labels: (...) int64.
        inplace_backward: backward overwrites the logits, where a backend has kernels for them.

    Returns:
        (...) float32, where verl's has the dtype of bfloat16 logits.
    """
    return logps_of_labels(logits, labels, inplace=inplace_backward)


def entropy_from_logits(logits: Tensor, chunk_size: int | None = None) -> Tensor:
    """verl's function of this name, and its variant with chunks, over token_logps.

    Args:
        logits: (..., V) float32, bfloat16 or float16.
        chunk_size: ignored; nothing V-sized is allocated in forward.

    Returns:
        (...) float32, in nats.
    """
    return entropy_of_rows(logits)


REPLACEMENTS: dict[str, Callable[..., Any]] = {
    "logprobs_from_logits": logprobs_from_logits,
    "entropy_from_logits": entropy_from_logits,
    "entropy_from_logits_with_chunking": entropy_from_logits,
}


def use_fused_logprobs() -> None:
    """Puts the functions above in the place of verl's, wherever verl has imported them.

    In every worker, with one line of configuration (verl imports what ``external_lib`` names)::

        actor_rollout_ref.model.external_lib=cfpo_kernels.integrations.verl_logprobs
    """
    replace_everywhere(verl_functional, REPLACEMENTS)
