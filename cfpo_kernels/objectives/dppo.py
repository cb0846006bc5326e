from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from .base import SCORE, UNSAFE, Objective, Shape, require_positive


@dataclass(frozen=True)
class DPPO(Objective):
    """A mask by divergence and a truncated weight: ``-A sg(min(r, cap)) log p`` where kept.

    A token is dropped where its advantage drives it across its bound, which
    ``cfpo_kernels.bounds`` makes from a divergence between its probabilities:
    ``log_ratio_bounds=bounds.total_variation(old_logps, 0.2)`` or ``bounds.kl(old_logps, 0.05)``.

    Args:
        cap: r weighs no more than this. verl's source says 20, its configuration 3.
        drift: see :class:`Objective`.

    Raises:
        ValueError: cap is not positive, or ``log_ratio_bounds`` is missing.

    Source: arXiv 2602.04879.
    """

    cap: float = 20.0

    name: ClassVar[str] = "dppo"
    bounded: ClassVar[str | None] = UNSAFE
    needs_bounds: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("cap", self.cap)

    def shape(self) -> Shape:
        return Shape("window", cap=math.log(self.cap), value=SCORE, drift=self.drift)
