from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..shapes import WEIGHTED, Shape
from .base import BOTH, Objective


@dataclass(frozen=True)
class IPO(Objective):
    """prime-rl's IPO: ``-r A``, and 0 where a token's probability has moved too far either way.

    Too far is what ``log_ratio_bounds`` say. prime-rl has |p - mu| > 0.1, mu of the sampler:
    ``log_ratio_bounds=bounds.total_variation(rollout_logps, 0.1)``; its ``kl_tau`` is half a drift.

    Not :func:`cfpo_kernels.preference.ipo_loss`, which is a loss of preference pairs.

    Args:
        drift: see :class:`Objective`.

    Raises:
        ValueError: ``log_ratio_bounds`` is missing.

    Source: prime-rl's default loss.

    Example:
        >>> logps = torch.tensor([-1.0, -1.0], requires_grad=True)
        >>> batch = (torch.tensor([1.0, -1.0]), logps.detach() - 0.4)  # A, old_logps: r = 1.49
        >>> how = {"objective": IPO(), "log_ratio_bounds": (-0.3, 0.3), "reduction": "sum"}
        >>> policy_loss_from_logps(logps, *batch, **how).backward()
        >>> logps.grad  # dropped for either sign
        tensor([0., 0.])
    """

    name: ClassVar[str] = "ipo"
    bounded: ClassVar[str | None] = BOTH
    needs_bounds: ClassVar[bool] = True

    def shape(self) -> Shape:
        return Shape("window", value=WEIGHTED, drift=self.drift)
