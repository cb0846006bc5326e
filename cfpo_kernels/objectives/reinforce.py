from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..shapes import SCORE, Shape
from .base import Objective


@dataclass(frozen=True)
class Reinforce(Objective):
    """The plain policy gradient, ``-A log p``, whatever the old policy was.

    With ``token_weights`` it takes any weight that does not depend on the current log-probs.

    Args:
        drift: see :class:`Objective`.

    It has no bounds, and refuses ``log_ratio_bounds``.

    Source: Williams, 1992.

    Example:
        >>> logps = torch.tensor([-1.0, -1.0], requires_grad=True)
        >>> batch = (torch.tensor([1.0, -1.0]), logps.detach() - 0.4)  # A, old_logps: r = 1.49
        >>> how = {"objective": Reinforce(), "reduction": "sum"}
        >>> policy_loss_from_logps(logps, *batch, **how).backward()
        >>> logps.grad  # whatever r is
        tensor([-1.,  1.])
    """

    name: ClassVar[str] = "reinforce"

    def shape(self) -> Shape:
        return Shape(
            "window", power_positive=0.0, power_negative=0.0, value=SCORE, drift=self.drift
        )
