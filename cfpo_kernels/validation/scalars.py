"""One flag, one choice, one number: from Python, or in a 0-d tensor."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable

import torch
from torch import Tensor

from ..plain import saveable
from . import values
from .errors import type_error

SMALLEST, LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def check_flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise type_error(name, value, "True or False")
    return value


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> str:
    if not isinstance(value, str):
        raise type_error(name, value, "one of " + ", ".join(map(repr, choices)))
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def finite_number(name: str, value: object) -> float:
    """From Python; torch.compile traces through it."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise type_error(name, value, "a number")
    if not -math.inf < value < math.inf:  # math.isfinite would break torch.compile's graph
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def positive_number(name: str, value: object) -> float:
    """Likewise, and what float32 holds of it is neither 0 nor infinite."""
    found = finite_number(name, value)
    if not SMALLEST <= found <= LARGEST:
        raise ValueError(f"{name} must be a positive float32, got {found}")
    return found


def scalar_tensor(name: str, value: Tensor, like: Tensor) -> Tensor:
    """A 0-d tensor, detached, on the device of another one."""
    if value.dim() != 0:
        raise ValueError(f"{name} must be a number or a 0-d tensor, got shape {tuple(value.shape)}")
    if value.dtype == torch.bool or value.is_complex():
        raise type_error(name, value, "a number or a real 0-d tensor")
    # A 0-d CPU tensor mixes with any device in torch, as a number does.
    return saveable(value).detach().to(like.device, non_blocking=True)


def number(
    name: str, value: object, accepted: str, is_accepted: Callable[[float], bool]
) -> float | Tensor:
    """A real number, or a 0-d tensor, whose value is looked at where that costs no device sync."""
    if isinstance(value, Tensor):
        if value.dim() != 0:
            raise ValueError(
                f"{name} must be {accepted}, or a 0-d tensor, got shape {tuple(value.shape)}"
            )
        if value.dtype == torch.bool or value.is_complex():
            raise type_error(name, value, f"{accepted}, or a real 0-d tensor")
        if values.can_be_checked(value):
            number(name, value.item(), accepted, is_accepted)
        return saveable(value).detach()
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise type_error(name, value, f"{accepted}, or a 0-d tensor")
    if not is_accepted(float(value)):
        raise ValueError(f"{name} must be {accepted}, got {value}")
    return float(value)


def plain_number(
    name: str, value: object, accepted: str, is_accepted: Callable[[float], bool]
) -> float:
    """A real number that the host has to know."""
    if isinstance(value, Tensor):
        raise TypeError(f"{name} must be {accepted}, got a tensor")
    checked = number(name, value, accepted, is_accepted)
    assert isinstance(checked, float)
    return checked


def positive(name: str, value: object) -> float | Tensor:
    return number(name, value, "a positive finite number", lambda x: 0 < x < math.inf)


def above_one(name: str, value: object) -> float | Tensor:
    return number(name, value, "a number above 1", lambda x: x > 1)


def on_device(value: float | Tensor, device: torch.device) -> Tensor:
    """0-d float64. Filled on the device: a copy from the host would wait for it."""
    if isinstance(value, Tensor):
        return value.to(device, torch.float64, non_blocking=True)
    return torch.full((), value, dtype=torch.float64, device=device)
