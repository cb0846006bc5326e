from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..shapes import Shape
from .base import Objective, require_number


@dataclass(frozen=True)
class PowerIS(Objective):
    """Importance sampling with a power: a token weighs ``r^power``, its gradient is ``-A r^power``.

    Powers of 1 are plain importance sampling, unbounded.

    Args:
        power_positive, power_negative: for A > 0 and for A < 0; below 1 they damp tokens that have
            become likely.
        drift: see :class:`Objective`.

    It has no bounds, and refuses ``log_ratio_bounds``.

    Raises:
        ValueError: a power is not finite.

    Source: the recipe `is_shape` of VESPO's authors, with 0.5 and 1.5.

    Example:
        >>> logps = torch.tensor([-1.0, -1.0], requires_grad=True)
        >>> batch = (torch.tensor([1.0, -1.0]), logps.detach() - 0.4)  # A, old_logps: r = 1.49
        >>> how = {"objective": PowerIS(0.5, 1.0), "reduction": "sum"}
        >>> policy_loss_from_logps(logps, *batch, **how).backward()
        >>> logps.grad  # r^0.5 for A > 0, r for A < 0
        tensor([-1.2214,  1.4918])
    """

    power_positive: float
    power_negative: float

    name: ClassVar[str] = "power_is"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("power_positive", self.power_positive)
        require_number("power_negative", self.power_negative)

    def shape(self) -> Shape:
        return Shape(
            "window",
            power_positive=self.power_positive,
            power_negative=self.power_negative,
            drift=self.drift,
        )
