from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..shapes import Shape
from .base import Objective, require_positive

# Beyond it the gate's slope is 0 in any precision, and e^x would meet it as inf * 0.
LARGEST_LOG_RATIO = 80.0


@dataclass(frozen=True)
class SAPO(Objective):
    """A soft gate in place of a clip: the loss is ``-4 / tau sigmoid(tau (r - 1)) A``.

    Args:
        tau_positive, tau_negative: the gate's sharpness for A > 0 and for A < 0.
        drift: see :class:`Objective`.

    It has no bounds, and refuses ``log_ratio_bounds``.

    Raises:
        ValueError: a tau is not positive.

    Source: arXiv 2511.20347.

    Example:
        >>> logps = torch.tensor([-1.0, -1.0], requires_grad=True)
        >>> batch = (torch.tensor([1.0, -1.0]), logps.detach() - 0.4)  # A, old_logps: r = 1.49
        >>> how = {"objective": SAPO(), "reduction": "sum"}
        >>> policy_loss_from_logps(logps, *batch, **how).backward()
        >>> logps.grad  # less than r, the further from 1 the more so
        tensor([-1.4051,  1.3966])
    """

    tau_positive: float = 1.0
    tau_negative: float = 1.05

    name: ClassVar[str] = "sapo"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("tau_positive", self.tau_positive)
        require_positive("tau_negative", self.tau_negative)

    def shape(self) -> Shape:
        return Shape(
            "sigmoid",
            power_positive=self.tau_positive,
            power_negative=self.tau_negative,
            cap=LARGEST_LOG_RATIO,
            drift=self.drift,
        )
