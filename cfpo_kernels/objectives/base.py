"""What a named objective is, and the checks of parameters that several share."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..formula import policy_loss
from ..given_numbers import as_float
from ..inputs import TokenInputs
from ..shapes import Shape
from ..two_pass import TokenTerms

# Which of a token's two bounds log_ratio_bounds replaces.
BOTH = "both"
_AS_THEY_ARE = (float, int, type(None), bool, str, tuple)
UNSAFE = "unsafe"  # the one that its advantage drives r across: the upper one for A > 0


@dataclass(frozen=True)
class Objective:
    """A named objective. Subclasses are frozen dataclasses of their parameters.

    Args:
        drift: adds ``drift / 2 * (log r)^2`` to the loss of each token, a pull back to the old
            policy; also where the advantage is 0.

    Example:
        >>> @dataclass(frozen=True)
        ... class Squared(Objective):  # a token's gradient is -A r^2
        ...     def shape(self):
        ...         return Shape("window", power_positive=2.0, power_negative=2.0, drift=self.drift)
        >>> logps, old_logps = torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, -1.5])
        >>> policy_loss_from_logps(logps, torch.ones(2), old_logps, objective=Squared())
        tensor(-1.8591)
    """

    drift: float = field(default=0.0, kw_only=True)

    name: ClassVar[str]
    # None: it has no bounds, and refuses log_ratio_bounds.
    bounded: ClassVar[str | None] = None
    needs_bounds: ClassVar[bool] = False

    def __post_init__(self) -> None:
        # Of numpy's kinds of numbers, and of others, Python's are made. Not by vars(), which
        # torch.compile does not follow here up to torch 2.9.
        for name in self.__dataclass_fields__:
            value = getattr(self, name, None)  # class variables are among the names
            if type(value) not in _AS_THEY_ARE and (number := as_float(value)) is not None:
                object.__setattr__(self, name, number)
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
    number = value if type(value) is float else _number(name, value)
    if not (least <= number < math.inf and number > above):
        bound = f"above {above:g}" if above > -math.inf else f"at least {least:g}"
        bound = "a finite number" if least == above == -math.inf else f"finite and {bound}"
        raise ValueError(f"{name} must be {bound}, got {value}")


def require_positive(name: str, value: object) -> None:
    number = value if type(value) is float else _number(name, value)
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be a positive finite number, got {value}")


def _number(name: str, value: object) -> float:
    number = as_float(value)
    if number is not None:
        return number
    if isinstance(value, Tensor):
        got = f"a tensor of {value.dtype} and shape {tuple(value.shape)} on {value.device}"
        raise TypeError(f"{name} must be a number, or a real 0-d tensor on the CPU, got {got}")
    raise TypeError(f"{name} must be a number, got {type(value).__name__}")


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


def require_ratio_bounds(low: float, high: float) -> tuple[float, float]:
    """Bounds on r, 0 or more; returns those on log r."""
    require_number("low", low, least=0.0)
    require_positive("high", high)
    if low >= high:
        raise ValueError(f"low must be below high, got {low} and {high}")
    return math.log(low) if low > 0 else -math.inf, math.log(high)


def log_or_inf(ratio: float | None) -> float:
    """log of a bound on r; infinity stands for None."""
    return math.inf if ratio is None else math.log(ratio)
