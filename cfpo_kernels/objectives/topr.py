from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..shapes import SCORE, Shape
from .base import Objective


@dataclass(frozen=True)
class TOPR(Objective):
    """Tapered off-policy REINFORCE by token: ``-A log p``, for A < 0 weighed by ``sg(min(r, 1))``.

    The paper tapers whole responses; this is what Trinity-RFT and ROLL do by token.

    Args:
        drift: see :class:`Objective`.

    It has no bounds of its own, and refuses ``log_ratio_bounds``.

    Source: arXiv 2503.14286.

    Example:
        >>> logps = torch.tensor([-1.0, -1.0], requires_grad=True)
        >>> batch = (torch.tensor([1.0, -1.0]), logps.detach() - 0.4)  # A, old_logps: r = 1.49
        >>> how = {"objective": TOPR(), "reduction": "sum"}
        >>> policy_loss_from_logps(logps, *batch, **how).backward()
        >>> logps.grad  # for A < 0 r, but at most 1
        tensor([-1.,  1.])
    """

    name: ClassVar[str] = "topr"

    def shape(self) -> Shape:
        return Shape(
            "window",
            power_positive=0.0,
            high_negative=0.0,
            above_negative=1.0,
            value=SCORE,
            drift=self.drift,
        )
