"""One flag, one choice, one number: from Python, or in a 0-d tensor."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..given_numbers import as_float, as_int
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
    """That the host has to know; torch.compile traces through it."""
    found = value if type(value) is float else as_float(value)  # the usual one without a call
    if found is None:
        raise type_error(name, value, host_number(value, "a number"))
    if not -math.inf < found < math.inf:  # math.isfinite would break torch.compile's graph
        raise ValueError(f"{name} must be finite, got {value}")
    return found


def host_number(value: object, accepted: str) -> str:
    """How `accepted` is said to who has given a tensor."""
    return f"{accepted}, or a real 0-d tensor on the CPU" if isinstance(value, Tensor) else accepted


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
    found = as_float(value)
    if found is None:
        raise type_error(name, value, f"{accepted}, or a 0-d tensor")
    if not is_accepted(found):
        raise ValueError(f"{name} must be {accepted}, got {value}")
    return found


def plain_number(
    name: str, value: object, accepted: str, is_accepted: Callable[[float], bool]
) -> float:
    """A real number that the host has to know."""
    found = as_float(value)
    if found is None:
        raise type_error(name, value, host_number(value, accepted))
    if not is_accepted(found):
        raise ValueError(f"{name} must be {accepted}, got {value}")
    return found


def positive_int(name: str, value: object) -> int:
    found = whole_number(name, value)
    if found < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return found


def whole_number(name: str, value: object) -> int:
    found = as_int(value)
    if found is None:
        raise type_error(name, value, host_number(value, "an integer"))
    return found


def positive(name: str, value: object) -> float | Tensor:
    return number(name, value, "a positive finite number", lambda x: 0 < x < math.inf)


def above_one(name: str, value: object) -> float | Tensor:
    return number(name, value, "a number above 1", lambda x: x > 1)


def on_device(value: float | Tensor, device: torch.device) -> Tensor:
    """0-d float64. Filled on the device: a copy from the host would wait for it."""
    if isinstance(value, Tensor):
        return value.to(device, torch.float64, non_blocking=True)
    return torch.full((), value, dtype=torch.float64, device=device)
