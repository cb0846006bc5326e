"""CFPO as a policy loss of verl: ``actor_rollout_ref.actor.policy_loss.loss_mode=cfpo``.

Importing this module registers the loss. verl does that itself, in every process: it imports what
installed packages announce in the entry-point group "verl.plugins", and this one announces it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import validation
from ..from_logps import policy_loss_from_logps
from ..linear import linear_token_logps
from ..objectives import CFPO
from ..validation import values
from ..vocab_parallel import VocabParallel
from ._logps import entropy_of_rows, logps_of_labels, replace_everywhere

try:
    import verl.utils.experimental.torch_functional as verl_fused
    import verl.utils.kernel.linear_cross_entropy as verl_kernel
    import verl.utils.torch_functional as verl_functional
    from verl.trainer.ppo.core_algos import agg_loss, register_policy_loss
    from verl.workers.config import ActorConfig
except ImportError as error:
    raise ImportError(
        "cfpo_kernels.integrations.verl needs verl: pip install 'verl>=0.9.1'"
    ) from error

__all__ = [
    "FusedLinearForPPO",
    "compute_policy_loss_cfpo",
    "entropy_from_logits",
    "linear_cross_entropy",
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


# Whether the fused functions' entropies are differentiable; use_fused_logprobs sets it.
_entropy_grad = True


class _ForTheLog(torch.autograd.Function):
    """Entropies that were computed without a gradient, and refuse one.

    verl multiplies them by an entropy_coeff of 0 too: only the numbers tell. Where looking at them
    would wait for the device, the log-probs' gradient becomes NaN instead.
    """

    @staticmethod
    def forward(ctx: Any, entropy: Tensor, logps: Tensor) -> Tensor:
        return entropy.view_as(entropy)

    @staticmethod
    def backward(ctx: Any, dentropy: Tensor) -> tuple[None, Tensor | None]:
        wanted = dentropy.any()
        if not values.can_be_checked(wanted):
            return None, torch.where(wanted, torch.nan, torch.zeros_like(dentropy))
        if wanted:
            raise RuntimeError(
                "the loss depends on entropies, which use_fused_logprobs(entropy_grad=False) "
                "computes without a gradient: set actor.entropy_coeff to 0, or "
                "model.external_lib to cfpo_kernels.integrations.verl_logprobs"
            )
        return None, None


def _fused(hidden: Tensor, weight: Tensor, labels: Tensor, **how: Any) -> tuple[Tensor, Tensor]:
    logps, entropy = linear_token_logps(
        hidden, weight, labels, return_entropy=True, entropy_grad=_entropy_grad, **how
    )
    return logps, entropy if _entropy_grad else _ForTheLog.apply(entropy, logps)


class FusedLinearForPPO(verl_fused.FusedLinearForPPO):
    """verl's module of this name over :func:`cfpo_kernels.linear_token_logps`.

    Args:
        chunk_size: tokens of each product. None: what linear_token_logps chooses.
        impl_backend: "torch" or "liger", which are the same here.
    """

    def __init__(self, chunk_size: int | None = None, impl_backend: str = "torch") -> None:
        super().__init__(impl_backend=impl_backend)
        self.chunk_size = chunk_size

    def forward(
        self,
        hidden_states: Tensor,
        vocab_weights: Tensor,
        input_ids: Tensor,
        temperature: float = 1.0,
    ) -> tuple[Tensor, ...]:
        """log p of the tokens and the entropies, (...) float32, from (..., H), (V, H), (...).

        verl's have no log-probs of a frozen head without its gradient, and entropies in bfloat16.
        """
        return _fused(
            hidden_states,
            vocab_weights,
            input_ids,
            temperature=temperature,
            chunk_tokens=self.chunk_size,
        )


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, ...]:
    """verl's function of this name over :func:`cfpo_kernels.linear_token_logps`.

    Args:
        hidden: (..., H); labels: (...), N in all.
        weight: (V, H), or one process's part of it, the same number of rows on each.
        reduction: "none", which is all that verl asks for.
        dist_process_group: of the processes that have the parts, Megatron's tensor-parallel group.
            The gradient of hidden is that of the part, as with verl's: Megatron's
            gather_from_sequence_parallel_region sums it.

    Returns:
        log p of the labels and the entropies, (N,) float32.

    Raises:
        ValueError: another reduction.
    """
    if reduction != "none":
        raise ValueError(f"reduction must be 'none', got {reduction!r}")
    parts = None
    if dist_process_group is not None:
        n_rows, group = weight.shape[0], dist_process_group
        parts = VocabParallel.even(group, n_rows, n_rows * group.size(), "none")
    return _fused(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        labels.reshape(-1),
        temperature=temperature,
        vocab_parallel=parts,
    )


REPLACEMENTS: dict[Any, dict[str, Callable[..., Any]]] = {
    verl_functional: {
        "logprobs_from_logits": logprobs_from_logits,
        "entropy_from_logits": entropy_from_logits,
        "entropy_from_logits_with_chunking": entropy_from_logits,
    },
    # What use_fused_kernels=true calls: FSDP's engines one or the other, Megatron's the latter.
    verl_fused: {"FusedLinearForPPO": FusedLinearForPPO},
    verl_kernel: {"linear_cross_entropy": linear_cross_entropy},
}


def use_fused_logprobs(*, entropy_grad: bool = True) -> None:
    """Puts the functions above in the place of verl's, wherever verl has imported them.

    In every worker, with one line of configuration (verl imports what ``external_lib`` names)::

        actor_rollout_ref.model.external_lib=cfpo_kernels.integrations.verl_logprobs

    Args:
        entropy_grad: False: with ``use_fused_kernels`` entropies are numbers for the log, and a
            frozen head takes two matrix products instead of up to four. verl asks for them at every
            step, but with ``actor.entropy_coeff=0`` its loss does not depend on them; if it does,
            backward refuses. external_lib=cfpo_kernels.integrations.verl_logprobs_entropy_free
    """
    global _entropy_grad
    _entropy_grad = validation.check_flag("entropy_grad", entropy_grad)
    for home, replacements in REPLACEMENTS.items():
        replace_everywhere(home, replacements)
