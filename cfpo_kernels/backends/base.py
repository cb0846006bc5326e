"""What a backend with kernels of its own has to offer."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from ..inputs import LossSettings, TokenInputs


class KernelRows(NamedTuple):
    """The rows that a kernel reads; N tokens, V columns."""

    logits: Tensor  # (..., V), last dimension of stride 1
    token_ids: Tensor  # (N,) int64
    weights: Tensor  # (N,) float32, 0: the row is not read
    temperature: Tensor  # (N,) or (1,) float32
    sharded: bool = False
    softcap: float = 0.0


class KernelTerms(NamedTuple):
    """What a policy loss is told beside its rows; tensors are float32."""

    inputs: TokenInputs
    settings: LossSettings
    grad_scale: Tensor | None  # 0-d


class Backend(Protocol):
    """Functions that fill the outputs they are given. Outputs may be uninitialised memory."""

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
        """Stages 1 and 2, and 3 where `dlogits` is given; it may be ``rows.logits``."""

    def token_logps(
        self, rows: KernelRows, *, logps: Tensor, lse: Tensor, entropy: Tensor | None
    ) -> None:
        """Stage 1. `lse` is float64: T * logsumexp(logits / T)."""

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
        """Stage 3. `dlogits` may be ``rows.logits``."""

    def multiply_rows(self, x: Tensor, factors: Tensor) -> None:
        """x[i] *= factors[i] in place, for x (..., V) and factors (N,); factor 1 costs nothing."""
