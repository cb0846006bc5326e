from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import SCORE, Objective, Shape


@dataclass(frozen=True)
class TOPR(Objective):
    """Tapered off-policy REINFORCE by token: ``-A log p``, for A < 0 weighed by ``sg(min(r, 1))``.

    The paper tapers whole responses; this is what Trinity-RFT and ROLL do by token.

    Args:
        drift: see :class:`Objective`.

    It has no bounds of its own, and refuses ``log_ratio_bounds``.

    Source: arXiv 2503.14286.
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
