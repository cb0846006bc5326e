"""Checks of values that live in tensors, made where looking at them costs no device sync."""

from __future__ import annotations

import os
from typing import NoReturn

import torch
from torch import Tensor


def can_be_checked(tensor: Tensor) -> bool:
    """On the CPU outside of torch.compile; on a GPU with CFPO_KERNELS_DEBUG=1 only."""
    if torch.compiler.is_compiling():
        return False
    return tensor.device.type == "cpu" or is_debugging()


def is_debugging() -> bool:
    return os.environ.get("CFPO_KERNELS_DEBUG", "") not in ("", "0")


def first_wrong(wrong: Tensor, values: Tensor, shape: torch.Size) -> tuple[list[int], float]:
    """Where the first one is in a tensor of `shape`, and what is there; `wrong`, `values` (N,)."""
    index = int(wrong.nonzero()[0])
    return position_of(index, shape), values[index].item()


def position_of(index: int, shape: torch.Size) -> list[int]:
    return [int(i) for i in torch.unravel_index(torch.tensor(index), shape)] if shape else []


def check_token_range(token_ids: Tensor, active: Tensor, n_cols: int, shape: torch.Size) -> None:
    """An id outside [0, V) in a row that counts; masked rows may hold any, such as -100."""
    wrong = active & ((token_ids < 0) | (token_ids >= n_cols))
    if wrong.any():
        refuse_token(token_ids, int(wrong.nonzero()[0]), n_cols, shape)


def refuse_token(token_ids: Tensor, row: int, n_cols: int, shape: torch.Size) -> NoReturn:
    position, got = position_of(row, shape), token_ids[row].item()
    raise IndexError(
        f"token_ids must be in [0, {n_cols}) where mask is not 0, got {got} at {position}"
    )
