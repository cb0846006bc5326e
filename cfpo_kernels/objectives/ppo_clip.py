from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ..shapes import Shape
from .base import UNSAFE, Objective, log_or_inf, require_clip_range


@dataclass(frozen=True)
class PPOClip(Objective):
    """PPO's clipped surrogate ``min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A)``.

    Args:
        epsilon_low, epsilon_high: the clip range below and above 1.
        dual_clip: for A < 0 the objective is at least ``dual_clip * A``. None: no dual clip.
        drift: see :class:`Objective`.

    ``log_ratio_bounds`` replace the clip range, not the dual clip.

    Raises:
        ValueError: a parameter is not positive, epsilon_low is 1 or more, dual_clip 1 or less.

    Source: arXiv 1707.06347, equation 7; the dual clip is arXiv 1912.09729, equation 5.

    Example:
        >>> logps = torch.tensor([-1.0, -1.0], requires_grad=True)
        >>> batch = (torch.tensor([1.0, -1.0]), logps.detach() - 0.4)  # A, old_logps: r = 1.49
        >>> how = {"objective": PPOClip(), "reduction": "sum"}
        >>> policy_loss_from_logps(logps, *batch, **how).backward()
        >>> logps.grad  # clipped for A > 0 alone
        tensor([0.0000, 1.4918])
    """

    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    dual_clip: float | None = None

    name: ClassVar[str] = "ppo_clip"
    bounded: ClassVar[str | None] = UNSAFE

    def __post_init__(self) -> None:
        super().__post_init__()
        require_clip_range(self.epsilon_low, self.epsilon_high, self.dual_clip)

    def shape(self) -> Shape:
        return Shape(
            "window",
            high_positive=math.log1p(self.epsilon_high),
            low_negative=math.log1p(-self.epsilon_low),
            high_negative=log_or_inf(self.dual_clip),
            drift=self.drift,
        )
