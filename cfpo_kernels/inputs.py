"""What a token brings to a loss and what a loss is told: named once, and passed on whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from .objectives.base import Shape

# Low and high, as log_ratio_bounds takes them, and as statistics use them.
LogRatioBounds = tuple[float | Tensor, float | Tensor]
Region = tuple[float, float] | tuple[Tensor, Tensor]


class TokenInputs(NamedTuple):
    """(N,), detached. csrc/core/params.h has the same names in the same order."""

    advantages: Tensor
    old_logps: Tensor | None = None  # None: on-policy
    token_weights: Tensor | None = None  # None: 1
    ref_logps: Tensor | None = None  # may be None where kl_coef is 0
    # Numbers for the shape in place of its own, from Objective.bounds_of.
    low: Tensor | None = None
    high: Tensor | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> TokenInputs:
        """With `change` applied to those that there are."""
        return TokenInputs(*(None if x is None else change(x) for x in self))  # type: ignore[arg-type]


class LossSettings(NamedTuple):
    """The numbers of a loss that are the same for all tokens."""

    shape: Shape
    kl_estimator: str = "k3"
    kl_ratio_weighted: bool = False
    kl_coef: float = 0.0
    entropy_coef: float = 0.0

    @property
    def needs_entropy(self) -> bool:
        return self.entropy_coef != 0
