"""BAPO's search for its bounds, as a loop over tokens."""

from __future__ import annotations

import math
from typing import Any

OPTIONS = {"low": (0.8, 0.95), "high": (1.2, 2.0), "low_step": 0.05, "high_step": 0.05}


def naive_bapo(x: Any, advantages: Any, mask: Any, target: float, **o: Any) -> tuple[float, float]:
    """The search as its authors wrote it: one candidate after the other."""
    (low, low_end), (high, high_end) = o["low"], o["high"]
    tokens = [
        (math.exp(max(-20.0, min(20.0, xi))), a)
        for xi, a, m in zip(x, advantages, mask, strict=True)
        if m
    ]

    def unmet() -> bool:
        gains = sum(min(r, high) * a for r, a in tokens if a > 0)
        losses = sum(max(r, low) * -a for r, a in tokens if a < 0)
        return losses > 0 and gains / losses < target

    while unmet() and low < low_end:
        low = min(low + o["low_step"], low_end)
    while unmet() and high < high_end:
        high = min(high + o["high_step"], high_end)
    return low, high
