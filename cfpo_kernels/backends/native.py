"""The native module's kernels as a backend, the same for the CPU and for CUDA."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..validation import values
from .addresses import describe, policy_terms, problem
from .base import KernelRows, KernelTerms
from .layout import row_blocks, rows_from


class NativeBackend:
    """See ``base.Backend``. A subclass says which module the kernels are in and how a call runs."""

    @property
    def kernels(self) -> Any:
        """What has the four functions of csrc/kernel_bindings.h."""
        raise NotImplementedError

    def execution(self, logits: Tensor, workspace: bool = False) -> Any:
        """A context manager that yields the last arguments of a call, which csrc makes its
        Execution of."""
        raise NotImplementedError

    def check_tokens(self, rows: KernelRows) -> None:
        # Here rather than with the other arguments, since compiled and direct calls of an operator
        # get past those. On a GPU only with CFPO_KERNELS_DEBUG: its kernels read no wrong address.
        if not rows.sharded and values.can_be_checked(rows.token_ids):
            logits = rows.logits
            active = rows.weights != 0
            values.check_token_range(rows.token_ids, active, logits.shape[-1], logits.shape[:-1])

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
        rows.check_whole()
        self.check_tokens(rows)
        pieces = [rows.logits] if dlogits is None else [rows.logits, dlogits]
        for first, (logits, *gradient) in row_blocks(*pieces):
            with self.execution(logits, workspace=True) as execution:
                self.kernels.policy_loss(
                    *problem(rows, logits, first),
                    describe(gradient[0]) if gradient else None,
                    *policy_terms(terms, first),
                    rows_from(loss, first),
                    rows_from(logps, first),
                    rows_from(entropy, first),
                    *execution,
                )

    def token_logps(
        self, rows: KernelRows, *, logps: Tensor, lse: Tensor, entropy: Tensor | None
    ) -> None:
        self.check_tokens(rows)
        for first, (logits,) in row_blocks(rows.logits):
            with self.execution(logits, workspace=True) as execution:
                self.kernels.token_logps(
                    *problem(rows, logits, first),
                    rows_from(logps, first),
                    rows_from(lse, first),
                    rows_from(entropy, first),
                    *execution,
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
        self.check_tokens(rows)
        for first, (logits, gradient) in row_blocks(rows.logits, dlogits):
            with self.execution(logits) as execution:
                self.kernels.token_logps_backward(
                    *problem(rows, logits, first),
                    describe(gradient),
                    rows_from(lse, first),
                    rows_from(entropy, first),
                    rows_from(dlogps, first),
                    rows_from(dentropy, first),
                    *execution,
                )

    def multiply_rows(self, x: Tensor, factors: Tensor) -> None:
        stride = factors.stride(0) if factors.numel() > 1 else 0
        for first, (piece,) in row_blocks(x):
            with self.execution(piece) as execution:
                own = rows_from(factors, first if stride else 0)
                self.kernels.multiply_rows(describe(piece), own, stride, *execution)
