"""The policy objectives, as parameters only: their formulas are in reference.py and csrc/core."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar


def _require_positive(name: str, value: float) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive finite number, got {value}")


@dataclass(frozen=True)
class CFPO:
    """Clipping-free policy optimisation: ``r A - |A| / (2 epsilon) (r - 1)^2`` is maximised.

    Args:
        epsilon: the ratio's distance from 1 at which the gradient of a token vanishes.
        log_ratio_clip: clamps ``log r`` to ``[-log_ratio_clip, log_ratio_clip]`` against overflow;
            a clamped token has no gradient. None: no clamp.

    Raises:
        ValueError: a parameter is not positive.

    Source: arXiv 2601.22801; the penalty is that of SPO, arXiv 2401.16025, Definition 5.1.
    """

    epsilon: float = 0.2
    log_ratio_clip: float | None = None

    name: ClassVar[str] = "cfpo"

    def __post_init__(self) -> None:
        _require_positive("epsilon", self.epsilon)
        if self.log_ratio_clip is not None:
            _require_positive("log_ratio_clip", self.log_ratio_clip)

    def parameters(self) -> list[float]:
        """What the kernels are given; infinity stands for None."""
        clip = math.inf if self.log_ratio_clip is None else float(self.log_ratio_clip)
        return [float(self.epsilon), clip]

    def trust_region(self) -> tuple[float, float]:
        """How far r may lie below and above 1 before ``outside_fraction`` counts it."""
        return float(self.epsilon), float(self.epsilon)


@dataclass(frozen=True)
class PPOClip:
    """PPO's clipped surrogate ``min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A)``.

    Args:
        epsilon_low, epsilon_high: the clip range below and above 1.
        dual_clip: for A < 0 the objective is at least ``dual_clip * A``. None: no dual clip.

    Raises:
        ValueError: a parameter is not positive, epsilon_low is 1 or more, dual_clip 1 or less.

    Source: arXiv 1707.06347, equation 7; the dual clip is arXiv 1912.09729, equation 5.
    """

    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    dual_clip: float | None = None

    name: ClassVar[str] = "ppo_clip"

    def __post_init__(self) -> None:
        _require_positive("epsilon_low", self.epsilon_low)
        _require_positive("epsilon_high", self.epsilon_high)
        if self.epsilon_low >= 1:
            raise ValueError(f"epsilon_low must be below 1, got {self.epsilon_low}")
        if self.dual_clip is not None:
            _require_positive("dual_clip", self.dual_clip)
            if self.dual_clip <= 1:
                raise ValueError(f"dual_clip must be above 1, got {self.dual_clip}")

    def parameters(self) -> list[float]:
        """What the kernels are given; infinity stands for None."""
        dual = math.inf if self.dual_clip is None else float(self.dual_clip)
        return [float(self.epsilon_low), float(self.epsilon_high), dual]

    def trust_region(self) -> tuple[float, float]:
        """How far r may lie below and above 1 before ``outside_fraction`` counts it."""
        return float(self.epsilon_low), float(self.epsilon_high)


Objective = CFPO | PPOClip
