from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..shapes import Shape
from .base import require_positive
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

    Example:
        >>> logps = torch.tensor([-1.0, -1.0], requires_grad=True)
        >>> batch = (torch.tensor([1.0, -1.0]), logps.detach() - 0.4)  # A, old_logps: r = 1.49
        >>> how = {"objective": DRO(beta=0.05), "reduction": "sum"}
        >>> policy_loss_from_logps(logps, *batch, **how).backward()
        >>> logps.grad  # -A + 0.05 log r
        tensor([-0.9800,  1.0200])
    """

    beta: float

    name: ClassVar[str] = "dro"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("beta", self.beta)

    def shape(self) -> Shape:
        return super().shape()._replace(drift=self.drift + self.beta)
