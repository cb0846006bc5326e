"""The C++ CPU kernels. The only file that turns tensors into addresses."""

from __future__ import annotations

import importlib
import os
from typing import Any

import torch
from torch import Tensor

from ..validation import check_token_range
from .base import KernelRows, KernelTerms
from .layout import row_blocks, row_layout

native: Any = None
import_failure = ""
try:
    # Importing torch first lets the module share torch's OpenMP runtime.
    native = importlib.import_module("cfpo_kernels._C")
except ImportError as error:  # a source tree that was never built: the reference still works
    import_failure = f"the native module could not be imported: {error}"

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _describe(x: Tensor) -> tuple[int, int, int, int, int, int, int]:
    layout = row_layout(x)
    assert layout is not None  # row_blocks saw to it
    return (x.data_ptr(), _DTYPES[x.dtype], x.shape[:-1].numel(), x.shape[-1], *layout)


def _address(x: Tensor | None, first: int) -> int:
    return 0 if x is None else x.data_ptr() + first * x.element_size()


def _execution() -> dict[str, Any]:
    # CFPO_KERNELS_CPU_LEVEL forces an instruction set: for tests and for comparing.
    level = os.environ.get("CFPO_KERNELS_CPU_LEVEL", "")
    return {"threads": torch.get_num_threads(), "level": level}


def _check_tokens(rows: KernelRows) -> None:
    # Here rather than with the other arguments, since compiled and direct calls of an operator get
    # past those, and a wrong id is a read outside the logits.
    logits = rows.logits
    check_token_range(rows.token_ids, rows.weights != 0, logits.shape[-1], logits.shape[:-1])


def _problem(rows: KernelRows, logits: Tensor, first: int) -> dict[str, Any]:
    per_row = int(rows.temperature.numel() > 1)
    return {
        "logits": _describe(logits),
        "token_ids": _address(rows.token_ids, first),
        "temperature": _address(rows.temperature, first * per_row),
        "temperature_stride": per_row,
        "weights": _address(rows.weights, first),
    }


class CpuBackend:
    """See ``base.Backend``."""

    def policy_loss(
        self,
        rows: KernelRows,
        terms: KernelTerms,
        *,
        loss: Tensor,
        logps: Tensor,
        entropy: Tensor | None,
        dlogits: Tensor | None,
    ) -> None:
        _check_tokens(rows)
        pieces = [rows.logits] if dlogits is None else [rows.logits, dlogits]
        for first, (logits, *gradient) in row_blocks(*pieces):
            native.policy_loss(
                **_problem(rows, logits, first),
                **_execution(),
                dlogits=_describe(gradient[0]) if gradient else None,
                advantages=_address(terms.advantages, first),
                old_logps=_address(terms.old_logps, first),
                token_weights=_address(terms.token_weights, first),
                ref_logps=_address(terms.ref_logps, first),
                objective=terms.objective,
                objective_parameters=terms.objective_parameters,
                kl_estimator=terms.kl_estimator,
                kl_coef=terms.kl_coef,
                entropy_coef=terms.entropy_coef,
                grad_scale=_address(terms.grad_scale, 0),
                loss=_address(loss, first),
                logps=_address(logps, first),
                entropy=_address(entropy, first),
            )

    def token_logps(
        self, rows: KernelRows, *, logps: Tensor, lse: Tensor, entropy: Tensor | None
    ) -> None:
        _check_tokens(rows)
        for first, (logits,) in row_blocks(rows.logits):
            native.token_logps(
                **_problem(rows, logits, first),
                **_execution(),
                logps=_address(logps, first),
                lse=_address(lse, first),
                entropy=_address(entropy, first),
            )

    def token_logps_backward(
        self,
        rows: KernelRows,
        *,
        lse: Tensor,
        entropy: Tensor | None,
        dlogps: Tensor | None,
        dentropy: Tensor | None,
        dlogits: Tensor,
    ) -> None:
        _check_tokens(rows)
        for first, (logits, gradient) in row_blocks(rows.logits, dlogits):
            native.token_logps_backward(
                **_problem(rows, logits, first),
                **_execution(),
                dlogits=_describe(gradient),
                lse=_address(lse, first),
                entropy=_address(entropy, first),
                dlogps=_address(dlogps, first),
                dentropy=_address(dentropy, first),
            )

    def multiply_rows(self, x: Tensor, factors: Tensor) -> None:
        stride = factors.stride(0) if factors.numel() > 1 else 0
        for first, (piece,) in row_blocks(x):
            native.multiply_rows(
                rows=_describe(piece),
                factors=_address(factors, first * stride),
                factor_stride=stride,
                **_execution(),
            )


CPU = CpuBackend()
