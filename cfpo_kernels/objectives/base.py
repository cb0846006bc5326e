"""What an objective is: numbers for one of the three shapes that the kernels know.

The shapes' formulas stand in formula.py, csrc/core/objective.h and triton_kernels/objective.py, and
in docs/design.md with their derivations. A named objective has none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..two_pass import TokenTerms

# What a window reports as loss; see csrc/core/objective.h.
SURROGATE, WEIGHTED, SCORE = 0.0, 1.0, 2.0


class Shape(NamedTuple):
    """A shape's name and its numbers, in pairs for A > 0 and for A <= 0.

    Attributes:
        kind: "window", "quadratic", "sigmoid", or the name of a registered Triton objective.
        low_*, high_*: window: bounds on log r. quadratic: ``high`` is the distance of the optimum
            of r from 1.
        drift: of ``drift / 2 * (log r)^2``.
        below_*, above_*: window: what is left of a token's gradient below and above the bounds: 0
            none of it, 1 that of the bound.
        power_*: window: the power of r that weighs a token. sigmoid: tau.
        cap: log r, or |log r| for quadratic, grows no further.
        value: window: SURROGATE, WEIGHTED or SCORE.
    """

    kind: str
    low_positive: float = -math.inf
    low_negative: float = -math.inf
    high_positive: float = math.inf
    high_negative: float = math.inf
    drift: float = 0.0
    below_positive: float = 0.0
    below_negative: float = 0.0
    above_positive: float = 0.0
    above_negative: float = 0.0
    power_positive: float = 1.0
    power_negative: float = 1.0
    cap: float = math.inf
    value: float = SURROGATE

    @property
    def numbers(self) -> list[float]:
        return [float(number) for number in self[1:]]


NUMBERS = Shape._fields[1:]

# Which of a token's two bounds log_ratio_bounds replaces.
BOTH = "both"
UNSAFE = "unsafe"  # the one that its advantage drives r across: the upper one for A > 0


@dataclass(frozen=True)
class Objective:
    """A named objective. Subclasses are frozen dataclasses of their parameters.

    Args:
        drift: adds ``drift / 2 * (log r)^2`` to the loss of each token, a pull back to the old
            policy; also where the advantage is 0.
    """

    drift: float = field(default=0.0, kw_only=True)

    name: ClassVar[str]
    # None: it has no bounds, and refuses log_ratio_bounds.
    bounded: ClassVar[str | None] = None
    needs_bounds: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_number("drift", self.drift, least=0.0)

    def shape(self) -> Shape:
        """What the kernels are given."""
        raise NotImplementedError

    def __call__(self, terms: TokenTerms) -> Tensor:
        """The loss of each token without its drift, in torch: for callables that change a part.

        ``objective=lambda terms: PPOClip()(terms) * my_mask(terms)``
        """
        if self.needs_bounds:
            raise ValueError(f"{type(self).__name__} cannot be called: it needs log_ratio_bounds")
        from ..formula import policy_loss  # which imports this module
        from ..inputs import TokenInputs

        inputs = TokenInputs(terms.advantages)
        return policy_loss(terms.logps, terms.log_ratio, inputs, self.shape()._replace(drift=0.0))

    def trust_region(self) -> tuple[float, float] | None:
        """The log-ratios that ``outside_fraction`` does not count, from and to; None: all."""
        shape = self.shape()
        low, high = shape.low_negative, shape.high_positive
        return None if (low, high) == (-math.inf, math.inf) else (low, high)

    def bounds_of(self, low: Tensor, high: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
        """Each token's numbers for the shape, from bounds on its log r; all (N,)."""
        if self.bounded == BOTH:
            return low, high
        shape, up = self.shape(), advantages > 0
        return (
            torch.where(up, torch.full_like(low, shape.low_positive), low),
            torch.where(up, high, torch.full_like(high, shape.high_negative)),
        )


def require_number(
    name: str, value: object, *, least: float = -math.inf, above: float = -math.inf
) -> None:
    """A finite number, at least `least` and greater than `above`."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not (least <= value < math.inf and value > above):
        bound = f"above {above:g}" if above > -math.inf else f"at least {least:g}"
        bound = "a finite number" if least == above == -math.inf else f"finite and {bound}"
        raise ValueError(f"{name} must be {bound}, got {value}")


def require_positive(name: str, value: object) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive finite number, got {value}")


def require_clip_range(epsilon_low: object, epsilon_high: object, dual_clip: object = None) -> None:
    """The parameters that clipped surrogates share."""
    require_positive("epsilon_low", epsilon_low)
    require_positive("epsilon_high", epsilon_high)
    if epsilon_low >= 1:  # type: ignore[operator]
        raise ValueError(f"epsilon_low must be below 1, got {epsilon_low}")
    if dual_clip is not None:
        require_positive("dual_clip", dual_clip)
        if dual_clip <= 1:  # type: ignore[operator]
            raise ValueError(f"dual_clip must be above 1, got {dual_clip}")


def require_ratio_bounds(low: object, high: object) -> None:
    require_number("low", low, least=0.0)
    require_positive("high", high)
    if low >= high:  # type: ignore[operator]
        raise ValueError(f"low must be below high, got {low} and {high}")


def log_or_inf(ratio: float | None) -> float:
    """log of a bound on r; infinity stands for None."""
    return math.inf if ratio is None else math.log(ratio)
