from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..shapes import Shape
from .base import UNSAFE, Objective, require_positive


@dataclass(frozen=True)
class CFPO(Objective):
    """Clipping-free policy optimisation: ``r A - |A| / (2 epsilon) (r - 1)^2`` is maximised.

    Args:
        epsilon: the ratio's distance from 1 at which the gradient of a token vanishes.
        log_ratio_clip: clamps ``log r`` to ``[-log_ratio_clip, log_ratio_clip]`` against overflow;
            a clamped token has no gradient. None: no clamp.
        epsilon_high: that distance for A > 0, as trainers' clip-higher. None: epsilon.
        drift: see :class:`Objective`.

    With ``log_ratio_bounds`` the gradient of a token vanishes on its bound.

    Raises:
        ValueError: a parameter is not positive.

    Source: arXiv 2601.22801; the penalty is that of SPO, arXiv 2401.16025, Definition 5.1.

    Example:
        >>> logps = torch.tensor([-1.0, -1.0], requires_grad=True)
        >>> batch = (torch.tensor([1.0, -1.0]), logps.detach() - 0.4)  # A, old_logps: r = 1.49
        >>> how = {"objective": CFPO(0.2), "reduction": "sum"}
        >>> policy_loss_from_logps(logps, *batch, **how).backward()
        >>> logps.grad  # both back: to r = 1.2, and to r = 0.8
        tensor([2.1768, 5.1604])
    """

    epsilon: float = 0.2
    log_ratio_clip: float | None = None
    epsilon_high: float | None = field(default=None, kw_only=True)

    name: ClassVar[str] = "cfpo"
    bounded: ClassVar[str | None] = UNSAFE

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("epsilon", self.epsilon)
        if self.log_ratio_clip is not None:
            require_positive("log_ratio_clip", self.log_ratio_clip)
        if self.epsilon_high is not None:
            require_positive("epsilon_high", self.epsilon_high)

    @property
    def _high(self) -> float:
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    def shape(self) -> Shape:
        return Shape(
            "quadratic",
            high_positive=self._high,
            high_negative=self.epsilon,
            cap=math.inf if self.log_ratio_clip is None else self.log_ratio_clip,
            drift=self.drift,
        )

    def trust_region(self) -> tuple[float, float]:
        low = math.log1p(-self.epsilon) if self.epsilon < 1 else -math.inf
        return low, math.log1p(self._high)

    def bounds_of(self, low: Tensor, high: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
        width = torch.where(advantages > 0, torch.expm1(high), -torch.expm1(low))
        # A width of 0 holds r at 1; it may not divide 0 by 0 there.
        return low, width.clamp(min=torch.finfo(width.dtype).tiny)
