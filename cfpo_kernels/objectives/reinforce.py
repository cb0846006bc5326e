from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import SCORE, Objective, Shape


@dataclass(frozen=True)
class Reinforce(Objective):
    """The plain policy gradient, ``-A log p``, whatever the old policy was.

    With ``token_weights`` it takes any weight that does not depend on the current log-probs.

    Args:
        drift: see :class:`Objective`.

    It has no bounds, and refuses ``log_ratio_bounds``.

    Source: Williams, 1992.
    """

    name: ClassVar[str] = "reinforce"

    def shape(self) -> Shape:
        return Shape(
            "window", power_positive=0.0, power_negative=0.0, value=SCORE, drift=self.drift
        )
