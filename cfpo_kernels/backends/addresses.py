"""Tensors as the native module takes them: addresses and numbers. Everything was checked before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import KernelRows, KernelTerms
from .layout import row_layout

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

RowsTuple = tuple[int, int, int, int, int, int, int]


def describe(x: Tensor) -> RowsTuple:
    layout = row_layout(x)
    assert layout is not None  # row_blocks saw to it
    return (x.data_ptr(), _DTYPES[x.dtype], x.shape[:-1].numel(), x.shape[-1], *layout)


def address(x: Tensor | None, first: int = 0) -> int:
    return 0 if x is None else x.data_ptr() + first * x.element_size()


def problem(rows: KernelRows, logits: Tensor, first: int) -> dict[str, Any]:
    """`logits`: the piece of the rows' logits that begins with row number `first`."""
    per_row = int(rows.temperature.numel() > 1)
    return {
        "logits": describe(logits),
        "token_ids": address(rows.token_ids, first),
        "temperature": address(rows.temperature, first * per_row),
        "temperature_stride": per_row,
        "weights": address(rows.weights, first),
        "sharded": rows.sharded,
        "softcap": rows.softcap,
    }


def policy_terms(terms: KernelTerms, first: int) -> dict[str, Any]:
    shape, *others = terms.settings
    names = type(terms.settings)._fields[1:]
    return {
        "columns": [address(column, first) for column in terms.inputs],
        "shape": shape.kind,
        "numbers": shape.numbers,
        **dict(zip(names, others, strict=True)),
        "grad_scale": address(terms.grad_scale),
    }
