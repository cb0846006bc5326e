from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ..shapes import Shape
from .base import UNSAFE, Objective, require_clip_range


@dataclass(frozen=True)
class ASPO(Objective):
    """PPO with the ratio turned over for A > 0, so that rare tokens gain more: ``1 / r`` for ``r``.

    For A > 0 a token weighs 1 / r, at most dual_clip, and is clipped above 1 + epsilon_high as in
    PPO. For A < 0 it is PPO whose tokens beyond the dual clip keep its gradient.

    Args:
        epsilon_low, epsilon_high: the clip range below and above 1.
        dual_clip: the largest weight of a token.
        drift: see :class:`Objective`.

    ``log_ratio_bounds`` replace the clip range, not the dual clip.

    Raises:
        ValueError: as :class:`PPOClip`.

    Source: arXiv 2510.06062.

    Example:
        >>> logps = torch.tensor([-1.0, -1.0], requires_grad=True)
        >>> batch = (torch.tensor([1.0, -1.0]), logps.detach() - 0.4)  # A, old_logps: r = 1.49
        >>> how = {"objective": ASPO(0.2, 0.6), "reduction": "sum"}
        >>> policy_loss_from_logps(logps, *batch, **how).backward()
        >>> logps.grad  # 1 / r for A > 0, r for A < 0
        tensor([-0.6703,  1.4918])
    """

    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    dual_clip: float = 3.0

    name: ClassVar[str] = "aspo"
    bounded: ClassVar[str | None] = UNSAFE

    def __post_init__(self) -> None:
        super().__post_init__()
        require_clip_range(self.epsilon_low, self.epsilon_high, self.dual_clip)

    def shape(self) -> Shape:
        most = math.log(self.dual_clip)
        return Shape(
            "window",
            low_positive=-most,
            high_positive=math.log1p(self.epsilon_high),
            below_positive=1.0,
            power_positive=-1.0,
            low_negative=math.log1p(-self.epsilon_low),
            high_negative=most,
            above_negative=1.0,
            drift=self.drift,
        )
