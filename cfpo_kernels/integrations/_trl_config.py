"""Which settings of TRL's GRPOConfig the fused loss can take, and what to set where it cannot."""

from __future__ import annotations

from typing import Any

from ..api import BACKENDS
from ..objectives import CFPO, Objective, PPOClip
from ..validation import check_choice, check_flag, check_objective

LOSS_TYPES = ("dapo", "grpo", "bnpo", "dr_grpo", "luspo")
OWN_OBJECTIVES = ("cispo", "sapo", "vespo")


def resolve_objective(args: Any, objective: Objective | None) -> Objective:
    """`objective`, or CFPO with ``args.epsilon``; refuses settings that would be ignored.

    Args:
        args: a ``trl.GRPOConfig``.

    Raises:
        ValueError: a setting that the loss cannot honour; the message says what to set instead.
    """
    _check_loss(args)
    if objective is None:
        objective = CFPO(args.epsilon)
    check_objective(objective)
    _check_epsilon_high(args, objective)
    _check_delta(args.delta, objective)
    return objective


def _check_loss(args: Any) -> None:
    if args.loss_type not in LOSS_TYPES:
        own = (
            " has an objective of its own;" if args.loss_type in OWN_OBJECTIVES else " is unknown:"
        )
        raise ValueError(
            f"loss_type={args.loss_type!r}{own} here loss_type only names the normalisation, so "
            f"set it to one of {', '.join(map(repr, LOSS_TYPES))}"
        )
    if args.importance_sampling_level != "token":
        raise ValueError(
            "the ratio is one of tokens so far: set importance_sampling_level='token', got "
            f"{args.importance_sampling_level!r}"
        )


def _check_epsilon_high(args: Any, objective: Objective) -> None:
    if args.epsilon_high in (None, args.epsilon):
        return
    clip = f"PPOClip(epsilon_low={args.epsilon}, epsilon_high={args.epsilon_high})"
    if not isinstance(objective, PPOClip):
        raise ValueError(
            f"epsilon_high={args.epsilon_high} has no meaning for CFPO, whose penalty has one "
            f"epsilon (epsilon={args.epsilon}): leave epsilon_high unset, or pass objective={clip}"
        )
    if objective.epsilon_high != args.epsilon_high:
        raise ValueError(
            f"epsilon_high={args.epsilon_high} contradicts objective={objective}: leave "
            f"epsilon_high unset, or pass objective={clip}"
        )


def _check_delta(delta: float | None, objective: Objective) -> None:
    if delta is None:
        return
    if not isinstance(objective, PPOClip):
        raise ValueError(
            f"delta={delta} bounds a clipped ratio, which {type(objective).__name__} has not: "
            "leave delta unset"
        )
    if objective.dual_clip != delta:
        raise ValueError(
            f"delta={delta} is PPOClip's dual_clip, got dual_clip={objective.dual_clip}: set both "
            "to the same number"
        )
    if delta < 1 + objective.epsilon_high:
        raise ValueError(
            f"delta={delta} must not be below 1 + epsilon_high = {1 + objective.epsilon_high}, or "
            "TRL would clip positive advantages with it: raise delta"
        )


def check_options(logits_tokens: object, inplace: object, backend: object) -> None:
    """The arguments that are no setting of TRL's."""
    if logits_tokens is not None:
        if not isinstance(logits_tokens, int) or isinstance(logits_tokens, bool):
            got = type(logits_tokens).__name__
            raise TypeError(f"logits_tokens must be an int or None, got {got}")
        if logits_tokens < 1:
            raise ValueError(f"logits_tokens must be at least 1, got {logits_tokens}")
    if inplace is not None:
        check_flag("inplace", inplace)
    if check_choice("backend", backend, BACKENDS) == "reference" and inplace:
        raise ValueError("inplace=True needs a backend with kernels, got backend='reference'")
