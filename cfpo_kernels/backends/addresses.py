"""Tensors as the native module takes them; it asks each for its address itself.

Everything was checked before. The order is that of csrc/kernel_bindings.h.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import KernelRows, KernelTerms
from .layout import row_layout, rows_from

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

RowsTuple = tuple[Tensor, int, int, int, int, int, int]


def describe(x: Tensor) -> RowsTuple:
    layout = row_layout(x)
    assert layout is not None  # row_blocks saw to it
    n_cols = x.shape[-1]
    return (x, _DTYPES[x.dtype], x.numel() // n_cols, n_cols, *layout)


def problem(rows: KernelRows, logits: Tensor, first: int) -> tuple[Any, ...]:
    """`logits`: the piece of the rows' logits that begins with row number `first`."""
    _, token_ids, weights, temperature, sharded, softcap = rows
    per_row = int(temperature.numel() > 1)
    if first:
        token_ids, weights = token_ids[first:], weights[first:]
        temperature = temperature[first * per_row :]
    return describe(logits), token_ids, temperature, per_row, weights, sharded, softcap


def policy_terms(terms: KernelTerms, first: int) -> tuple[Any, ...]:
    inputs, (shape, *others), grad_scale = terms
    columns = [rows_from(column, first) for column in inputs] if first else inputs
    return columns, shape.kind, shape.numbers, *others, grad_scale
