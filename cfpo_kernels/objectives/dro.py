from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import Shape, require_positive
from .reinforce import Reinforce


@dataclass(frozen=True)
class DRO(Reinforce):
    """Direct reward optimisation by token: ``-A log p + beta / 2 (log r)^2``.

    The paper's advantage is the reward less a learned value; that is the caller's business.

    Args:
        beta: strength of the pull to the old policy. Tinker's example has 0.05.
        drift: see :class:`Objective`; adds to beta.

    It has no bounds, and refuses ``log_ratio_bounds``.

    Raises:
        ValueError: beta is not positive.

    Source: arXiv 2405.19107, as verl's "dro".
    """

    beta: float

    name: ClassVar[str] = "dro"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("beta", self.beta)

    def shape(self) -> Shape:
        return super().shape()._replace(drift=self.drift + self.beta)
