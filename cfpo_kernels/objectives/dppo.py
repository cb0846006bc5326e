from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ..shapes import SCORE, Shape
from .base import UNSAFE, Objective, require_positive


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

    Example:
        >>> logps = torch.tensor([-1.0, -1.0], requires_grad=True)
        >>> batch = (torch.tensor([1.0, -1.0]), logps.detach() - 0.4)  # A, old_logps: r = 1.49
        >>> how = {"objective": DPPO(), "log_ratio_bounds": (-0.3, 0.3), "reduction": "sum"}
        >>> policy_loss_from_logps(logps, *batch, **how).backward()
        >>> logps.grad  # dropped for A > 0, whose bound is the upper one
        tensor([0.0000, 1.4918])
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
