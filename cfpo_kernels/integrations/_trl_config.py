"""Which settings of TRL's GRPOConfig the fused loss can take, and what to set where it cannot."""

from __future__ import annotations

from typing import Any

from ..api import BACKENDS
from ..objectives import CFPO, CISPO, SAPO, Objective, PPOClip
from ..runners import may_overwrite
from ..validation import check_choice, check_flag, check_objective
from ..validation.scalars import positive_int

LOSS_TYPES = ("dapo", "grpo", "bnpo", "dr_grpo")
OWN_OBJECTIVES = ("cispo", "sapo", "vespo", "luspo")


class Vespo:
    """TRL's loss_type "vespo": its weights of whole sequences, by TRL's own function."""


def resolve_objective(args: Any, objective: Objective | None) -> Objective | Vespo:
    """`objective`, or what ``loss_type`` stands for: CFPO, or an objective of its own.

    Args:
        args: a ``trl.GRPOConfig``.

    Raises:
        ValueError: a setting that the loss cannot honour; the message says what to set instead.
    """
    if args.loss_type in OWN_OBJECTIVES:
        return _own_objective(args, objective)
    if args.loss_type not in LOSS_TYPES:
        raise ValueError(
            f"loss_type={args.loss_type!r} is unknown: set it to one of "
            f"{', '.join(map(repr, LOSS_TYPES + OWN_OBJECTIVES))}"
        )
    if objective is None:
        objective = CFPO(args.epsilon, epsilon_high=args.epsilon_high)
    if not isinstance(check_objective(objective), Objective):
        raise TypeError("objective must be CFPO(...), PPOClip(...) or another, got a callable")
    if objective.needs_bounds:
        raise ValueError(
            f"objective={objective} needs log_ratio_bounds, which TRL's batches have not"
        )
    _check_epsilon_high(args, objective)
    _check_delta(args.delta, objective)
    return objective


def _own_objective(args: Any, objective: Objective | None) -> Objective | Vespo:
    if objective is not None:
        raise ValueError(
            f"loss_type={args.loss_type!r} has an objective of its own: leave objective unset, or "
            f"set loss_type to one of {', '.join(map(repr, LOSS_TYPES))}"
        )
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    if args.loss_type == "luspo":
        clip = PPOClip(args.epsilon, high, dual_clip=args.delta)
        _check_delta(args.delta, clip)
        return clip
    if args.delta is not None:
        raise ValueError(
            f"delta={args.delta} has no meaning for loss_type={args.loss_type!r}: leave delta unset"
        )
    if args.loss_type == "cispo":
        return CISPO(0.0, high)  # as TRL has it: a bound on the ratio itself
    if args.loss_type == "sapo":
        return SAPO(args.sapo_temperature_pos, args.sapo_temperature_neg)
    return Vespo()


def _check_epsilon_high(args: Any, objective: Objective) -> None:
    if args.epsilon_high in (None, args.epsilon):
        return
    own = getattr(objective, "epsilon_high", None)
    if own is None and not isinstance(objective, CFPO):
        raise ValueError(
            f"epsilon_high={args.epsilon_high} has no meaning for {type(objective).__name__}: "
            "leave epsilon_high unset"
        )
    if own != args.epsilon_high:
        raise ValueError(
            f"epsilon_high={args.epsilon_high} contradicts objective={objective}: leave "
            f"epsilon_high unset, or give the objective the same"
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
        positive_int("logits_tokens", logits_tokens)
    if inplace is not None:
        check_flag("inplace", inplace)
    name = check_choice("backend", backend, BACKENDS)
    if inplace and not may_overwrite(name):
        raise ValueError(f"inplace=True needs a backend with kernels, got backend={name!r}")
