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
    }


def policy_terms(terms: KernelTerms, first: int) -> dict[str, Any]:
    return {
        "advantages": address(terms.advantages, first),
        "old_logps": address(terms.old_logps, first),
        "token_weights": address(terms.token_weights, first),
        "ref_logps": address(terms.ref_logps, first),
        "objective": terms.objective,
        "objective_parameters": terms.objective_parameters,
        "kl_estimator": terms.kl_estimator,
        "kl_coef": terms.kl_coef,
        "entropy_coef": terms.entropy_coef,
        "grad_scale": address(terms.grad_scale),
    }
