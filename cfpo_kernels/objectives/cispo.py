from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..shapes import SCORE, Shape
from .base import BOTH, Objective, require_ratio_bounds


@dataclass(frozen=True)
class CISPO(Objective):
    """Clipped importance weights, detached: the loss is ``-sg(clip(r, low, high)) A log p``.

    No token loses its gradient; what is bounded is its weight.

    Args:
        low, high: bounds on r itself. Trainers differ: verl and slime give 1 - eps and 1 + eps, TRL
            an absolute upper bound.
        drift: see :class:`Objective`.

    ``log_ratio_bounds`` replace both.

    Raises:
        ValueError: not 0 <= low < high.

    Source: MiniMax-M1, arXiv 2506.13585; the defaults are those of ScaleRL.

    Example:
        >>> logps = torch.tensor([-1.0, -1.0], requires_grad=True)
        >>> batch = (torch.tensor([1.0, -1.0]), logps.detach() - 0.4)  # A, old_logps: r = 1.49
        >>> how = {"objective": CISPO(high=1.2), "reduction": "sum"}
        >>> policy_loss_from_logps(logps, *batch, **how).backward()
        >>> logps.grad  # weighs 1.2
        tensor([-1.2000,  1.2000])
    """

    low: float = 0.0
    high: float = 5.0

    name: ClassVar[str] = "cispo"
    bounded: ClassVar[str | None] = BOTH

    def __post_init__(self) -> None:
        super().__post_init__()
        require_ratio_bounds(self.low, self.high)

    def shape(self) -> Shape:
        low, high = require_ratio_bounds(self.low, self.high)
        return Shape(
            "window",
            low_positive=low,
            low_negative=low,
            high_positive=high,
            high_negative=high,
            below_positive=1.0,
            below_negative=1.0,
            above_positive=1.0,
            above_negative=1.0,
            value=SCORE,
            drift=self.drift,
        )
