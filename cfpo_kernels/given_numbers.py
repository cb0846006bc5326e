"""Numbers as Python, numpy, a configuration or a tensor has them."""

from __future__ import annotations

import math
import operator

import torch
from torch import Tensor


def as_float(value: object) -> float | None:
    """A real number as Python's; None of anything else, a tensor on another device among it."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            return math.copysign(math.inf, value)
    if not _is_scalar(value):
        return None
    try:
        return float(value)  # type: ignore[arg-type]
    except TypeError:
        return None
    except OverflowError:
        return math.inf


def as_int(value: object) -> int | None:
    """Likewise an integer."""
    if not _is_scalar(value):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def _is_scalar(value: object) -> bool:
    if isinstance(value, (bool, str, bytes)):
        return False
    if isinstance(value, Tensor):
        is_real = value.dtype != torch.bool and not value.is_complex()
        return value.dim() == 0 and value.is_cpu and is_real
    # Of numpy: no bool, and no array of one number, which may have come in the place of many.
    return getattr(value, "ndim", 0) == 0 and type(value).__name__ not in ("bool", "bool_")
