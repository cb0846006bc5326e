"""The three shapes that the kernels know, and the numbers that they are told.

Their formulas stand in formula.py, csrc/core/objective.h and triton_kernels/objective.py, and in
docs/maths.md with their derivations.
"""

from __future__ import annotations

import math
from typing import NamedTuple

# What a window reports as loss; see csrc/core/objective.h.
SURROGATE, WEIGHTED, SCORE = 0.0, 1.0, 2.0


class Shape(NamedTuple):
    """A shape's name and its numbers, in pairs for A > 0 and for A <= 0.

    Attributes:
        kind: "window", "quadratic", "sigmoid", or the name of a registered Triton objective.
        low_*, high_*: window: bounds on log r. quadratic: ``high`` is the distance of the optimum
            of r from 1.
        drift: of ``drift / 2 * (log r)^2``.
        below_*, above_*: window: what is left of a token's gradient below and above the bounds: 0
            none of it, 1 that of the bound.
        power_*: window: the power of r that weighs a token. sigmoid: tau.
        cap: log r, or |log r| for quadratic, grows no further.
        value: window: SURROGATE, WEIGHTED or SCORE.
    """

    kind: str
    low_positive: float = -math.inf
    low_negative: float = -math.inf
    high_positive: float = math.inf
    high_negative: float = math.inf
    drift: float = 0.0
    below_positive: float = 0.0
    below_negative: float = 0.0
    above_positive: float = 0.0
    above_negative: float = 0.0
    power_positive: float = 1.0
    power_negative: float = 1.0
    cap: float = math.inf
    value: float = SURROGATE

    @property
    def numbers(self) -> list[float]:
        _, *numbers = self  # KernelRows.tensors says why not by a slice
        return list(map(float, numbers))


NUMBERS = Shape._fields[1:]
