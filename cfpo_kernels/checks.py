"""What the functions beside the kernels share: numbers, log-probs, and the sequences of a batch."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import validation
from .validation import Tokens


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
            raise validation._type_error(name, value, f"{accepted}, or a real 0-d tensor")
        if validation.values_can_be_checked(value):
            number(name, value.item(), accepted, is_accepted)
        return value.detach()
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise validation._type_error(name, value, f"{accepted}, or a 0-d tensor")
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


def scalar(value: float | Tensor, device: torch.device) -> Tensor:
    """0-d float64. Filled on the device: a copy from the host would wait for it."""
    if isinstance(value, Tensor):
        return value.to(device, torch.float64, non_blocking=True)
    return torch.full((), value, dtype=torch.float64, device=device)


def floats(name: str, value: object) -> Tensor:
    """A dense floating-point tensor of any shape."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise validation._type_error(name, value, "a floating-point tensor")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got one of layout {value.layout}")
    return value


def same_shape(name: str, value: object, like_name: str, like: Tensor) -> Tensor:
    """A floating-point tensor of another one's shape and device, in float64; differentiable."""
    flat = validation._per_token(name, value, Tokens(like_name, like.double()))
    return flat.reshape(like.shape)


def result_dtype(tensor: Tensor) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.promote_types(tensor.dtype, torch.float32)


@dataclass
class Sequences:
    """How the N tokens of a batch, in order, fall into B sequences."""

    index: Tensor  # (N,) int64, the sequence of each token; rises
    longest: int  # at least the length of the longest one; known without looking at a value
    shape: torch.Size  # of what has one number a sequence
    active: Tensor  # (N,) bool, the mask

    def starts(self) -> Tensor:
        """(N,) int64, where the sequence of each token begins."""
        return torch.searchsorted(self.index, self.index)


def sequences(
    name: str,
    source: Tensor,
    mask: object,
    cu_seqlens: object | None,
) -> Sequences:
    """The sequences of padded (..., T) or packed (N,) tokens; `source` is "logits" with V more."""
    tokens = Tokens(name, source)
    active = validation._active(mask, tokens)
    if cu_seqlens is None and len(tokens.shape) < 2:
        padded, packed = ("(B, T, V)", "(N, V)") if name == "logits" else ("(B, T)", "(N,)")
        raise ValueError(
            f"{name} must be {padded}, or packed {packed} with cu_seqlens, "
            f"got shape {tuple(source.shape)}"
        )
    index, n = validation._sequence_index(tokens, True, name, cu_seqlens)
    assert index is not None
    shape = tokens.shape[:-1] if cu_seqlens is None else torch.Size([n])
    return Sequences(index.contiguous(), tokens.shape[-1], shape, active)
