from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ..shapes import Shape
from .base import UNSAFE, Objective, log_or_inf, require_clip_range, require_number


@dataclass(frozen=True)
class GPPO(Objective):
    """PPO whose clipped tokens keep a gradient: a clipped token's is beta times its bound's.

    Args:
        epsilon_low, epsilon_high: the clip range below and above 1.
        beta_low: what tokens with A < 0 keep below the range; 0 is PPO.
        beta_high: what tokens with A > 0 keep above the range. The betas are CE-GPPO's, whose code
            has 0.25 and 1.
        dual_clip: tokens with A < 0 have no gradient where r is above it. None: no dual clip.
        drift: see :class:`Objective`.

    ``log_ratio_bounds`` replace the clip range, not the dual clip.

    Raises:
        ValueError: as :class:`PPOClip`, or a negative beta.

    Source: the code of Klear-Reasoner, and that of CE-GPPO.

    Example:
        >>> logps = torch.tensor([-1.0, -1.0], requires_grad=True)
        >>> batch = (torch.tensor([1.0, -1.0]), logps.detach() - 0.4)  # A, old_logps: r = 1.49
        >>> how = {"objective": GPPO(beta_high=0.5), "reduction": "sum"}
        >>> policy_loss_from_logps(logps, *batch, **how).backward()
        >>> logps.grad  # for A > 0 half of the bound, 1.2, is kept
        tensor([-0.6000,  1.4918])
    """

    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    beta_low: float = 1.0
    beta_high: float = 1.0
    dual_clip: float | None = 3.0

    name: ClassVar[str] = "gppo"
    bounded: ClassVar[str | None] = UNSAFE

    def __post_init__(self) -> None:
        super().__post_init__()
        require_clip_range(self.epsilon_low, self.epsilon_high, self.dual_clip)
        require_number("beta_low", self.beta_low, least=0.0)
        require_number("beta_high", self.beta_high, least=0.0)

    def shape(self) -> Shape:
        return Shape(
            "window",
            high_positive=math.log1p(self.epsilon_high),
            low_negative=math.log1p(-self.epsilon_low),
            high_negative=log_or_inf(self.dual_clip),
            above_positive=self.beta_high,
            below_negative=self.beta_low,
            drift=self.drift,
        )
