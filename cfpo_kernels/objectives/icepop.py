from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..shapes import WEIGHTED, Shape
from .base import BOTH, Objective, require_ratio_bounds


@dataclass(frozen=True)
class IcePop(Objective):
    """A mask on the ratio: the loss is ``-r A`` for r in [low, high], and 0 outside.

    Args:
        low, high: bounds on r itself, on both sides whatever the sign of A.
        drift: see :class:`Objective`.

    With r against the sampler's log-probs. Between two sets of log-probs that are both constants
    it is a weight: see :func:`rollout_weights`.

    ``log_ratio_bounds`` replace both.

    Raises:
        ValueError: not 0 <= low < high.

    Source: the report on Ring-1T, and prime-rl, which has it in the loss.

    Example:
        >>> logps = torch.tensor([-1.0, -1.0], requires_grad=True)
        >>> batch = (torch.tensor([1.0, -1.0]), logps.detach() - 0.4)  # A, old_logps: r = 1.49
        >>> how = {"objective": IcePop(0.7, 1.4), "reduction": "sum"}
        >>> policy_loss_from_logps(logps, *batch, **how).backward()
        >>> logps.grad  # dropped for either sign
        tensor([0., 0.])
    """

    low: float = 0.5
    high: float = 5.0

    name: ClassVar[str] = "ice_pop"
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
            value=WEIGHTED,
            drift=self.drift,
        )
