"""What a policy loss needs beside the rows: objective, numbers of each token, settings, weights."""

from __future__ import annotations

import math
from dataclasses import MISSING, fields

import torch
from torch import Tensor

from ..formula import ONE_TOKEN
from ..given_numbers import as_float
from ..inputs import LossSettings, Region, TokenInputs
from ..objectives import Objective
from ..objectives.triton import TritonObjective
from ..plain import saveable
from ..shapes import Shape
from ..two_pass import SequenceRatio, TorchObjective
from ..weights import REDUCTIONS, equal_weights, row_weights
from . import values
from .errors import type_error
from .scalars import (
    LARGEST,
    check_choice,
    check_flag,
    finite_number,
    positive_number,
    scalar_tensor,
)
from .sequences import sequence_index_of
from .tensors import check_advantages, per_token
from .types import AnyObjective, Logps, LossTerms, PerToken, Rows

RATIO_LEVELS = ("token", "sequence")
KL_ESTIMATORS = ("k1", "k2", "k3", "k1+", "k3+")


def check_objective(objective: object) -> AnyObjective:
    if isinstance(objective, Objective):
        return objective
    accepted = "CFPO(...), PPOClip(...) or another objective, or a callable"
    if isinstance(objective, type) and issubclass(objective, Objective):
        needs = any(x.default is MISSING and x.init for x in fields(objective))
        made = f"{objective.__name__}({'...' if needs else ''})"
        raise TypeError(
            f"objective must be {accepted}, got the class {objective.__name__} itself: write {made}"
        )
    if not callable(objective):
        raise type_error("objective", objective, accepted)
    return objective


def check_formula(objective: object, runs_triton: bool) -> None:
    """Refuses an objective that has no formula where it is to run."""
    if isinstance(objective, TritonObjective) and not runs_triton:
        raise ValueError(
            f"objective {objective.name!r} is written in Triton: it needs backend='triton' and "
            "ratio_level='token'; a callable in torch runs everywhere"
        )


def check_loss_terms(
    rows: Rows | Logps,
    objective: AnyObjective,
    *,
    advantages: object,
    old_logps: object | None,
    reduction: object,
    normalizer: object | None,
    cu_seqlens: object | None,
    token_weights: object | None,
    ref_logps: object | None,
    log_ratio_bounds: object | None,
    kl_coef: object,
    kl_estimator: object,
    kl_ratio_weighted: object,
    entropy_coef: object,
    ratio_level: object,
    sequence_group: object | None,
    grad_scale: object | None = None,
) -> LossTerms:
    """The checks of the policy losses; computes the weights of the rows."""
    chosen = check_choice("reduction", reduction, REDUCTIONS)
    settings = LossSettings(
        objective.shape() if isinstance(objective, Objective) else Shape("torch"),
        check_choice("kl_estimator", kl_estimator, KL_ESTIMATORS),
        check_flag("kl_ratio_weighted", kl_ratio_weighted),
        finite_number("kl_coef", kl_coef),
        finite_number("entropy_coef", entropy_coef),
    )
    if settings.kl_coef != 0 and ref_logps is None:
        raise ValueError(f"ref_logps must be given where kl_coef is not 0, got kl_coef={kl_coef}")
    level = check_choice("ratio_level", ratio_level, RATIO_LEVELS)
    needs = "ratio_level='sequence'" if level == "sequence" else f"reduction {chosen!r}"
    wants_sequences = level == "sequence" or chosen.startswith("seq-")
    sequence_index, n_sequences = None, 0
    if wants_sequences or cu_seqlens is not None:
        sequence_index, n_sequences = sequence_index_of(rows, needs, cu_seqlens)
    advantage_rows, by_token = check_advantages(advantages, rows, sequence_index, n_sequences)
    region, merged = _bounds(log_ratio_bounds, objective, advantage_rows, rows)
    inputs = TokenInputs(
        advantage_rows,
        _constant("old_logps", old_logps, rows),
        _constant("token_weights", token_weights, rows),
        _constant("ref_logps", ref_logps, rows),
        *merged,
    )
    divisor = _normalizer(normalizer, rows.source)
    if isinstance(rows, Rows) and rows.mask is None and not chosen.startswith("seq-"):
        weights = equal_weights(rows.shape.numel(), chosen, divisor, rows.dtype, rows.source.device)
    else:
        weights = row_weights(
            rows.active,
            chosen,
            group=sequence_group,
            sequence_index=sequence_index,
            n_sequences=n_sequences,
            normalizer=divisor,
            dtype=rows.dtype,
        )
    beyond = ONE_TOKEN
    if level == "sequence":
        assert sequence_index is not None
        longest = rows.shape[-1]
        ratio = SequenceRatio(sequence_index, n_sequences, longest, by_token, sequence_group)
        beyond = beyond._replace(ratio=ratio)
    if not isinstance(objective, Objective):
        bounds = None if cu_seqlens is None else saveable(cu_seqlens)  # type: ignore[arg-type]
        function = TorchObjective(objective, rows.shape, bounds)
        beyond = beyond._replace(function=function)
    scale = _grad_scale(grad_scale, rows.source)
    return LossTerms(weights, inputs, settings, region, beyond, scale)


def _constant(name: str, value: object | None, tokens: PerToken) -> Tensor | None:
    return None if value is None else per_token(name, value, tokens).detach()


Bounds = tuple[Tensor | None, Tensor | None]


def _bounds(
    value: object, objective: AnyObjective, advantages: Tensor, tokens: PerToken
) -> tuple[Region | None, Bounds]:
    """What statistics hold log r against, and `log_ratio_bounds` as numbers of the shape."""
    if not isinstance(objective, Objective):
        if value is not None:
            raise ValueError("log_ratio_bounds must be None for a callable, which has its own")
        return None, (None, None)
    name = type(objective).__name__
    if value is None:
        if objective.needs_bounds:
            raise ValueError(
                f"log_ratio_bounds must be given for {name}, which has none of its own; "
                "cfpo_kernels.bounds makes them from a divergence"
            )
        return objective.trust_region(), (None, None)
    if objective.bounded is None:
        raise ValueError(f"log_ratio_bounds must be None for {name}, which has no bounds")
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise type_error("log_ratio_bounds", value, "a pair (low, high)")
    low = _bound("log_ratio_bounds[0]", value[0], tokens)
    high = _bound("log_ratio_bounds[1]", value[1], tokens)
    with torch.no_grad():
        return (low, high), objective.bounds_of(low, high, advantages)


def _bound(name: str, value: object, tokens: PerToken) -> Tensor:
    if not isinstance(value, Tensor):
        accepted = "a number or a floating-point tensor"
        bound = as_float(value)
        if bound is None:
            raise type_error(name, value, accepted)
        if math.isnan(bound):
            raise ValueError(f"{name} must be {accepted}, got nan")
        device = tokens.source.device
        return torch.full((tokens.shape.numel(),), bound, dtype=tokens.dtype, device=device)
    if value.dim() == 0:
        scalar = scalar_tensor(name, value, tokens.source)
        return scalar.to(tokens.dtype).expand(tokens.shape.numel()).contiguous()
    return per_token(name, value, tokens).detach()


def _normalizer(value: object | None, logits: Tensor) -> float | Tensor | None:
    if value is None:
        return None
    if isinstance(value, Tensor):
        # 0 is the token count of a batch that is all masked.
        scalar = scalar_tensor("normalizer", value, logits)
        if values.can_be_checked(value) and not 0 <= value.item() <= LARGEST:
            raise ValueError(f"normalizer must be finite and not negative, got {value.item()}")
        return scalar
    return positive_number("normalizer", value)


def _grad_scale(value: object | None, logits: Tensor) -> Tensor | None:
    if value is None:
        return None
    if isinstance(value, Tensor):
        scale = scalar_tensor("grad_scale", value, logits)
        if values.can_be_checked(value):
            positive_number("grad_scale", value.item())
        return scale.to(torch.float32)
    number = positive_number("grad_scale", value)
    return torch.full((), number, dtype=torch.float32, device=logits.device)
