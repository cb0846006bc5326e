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
    # They are some columns of longer rows, and a token outside [0, V) is among the others: it is no
    # error, and its log-prob is -inf. Not for a loss, which takes all columns.
    sharded: bool = False
    # c: what is there are z, and the logits are c * tanh(z / c), in float32; gradients are those of
    # z. A float32 number between 1e-30 and 1e30, or 0: the logits are what is there.
    softcap: float = 0.0

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The first four. torch.compile cannot slice a NamedTuple before torch 2.9."""
        return self.logits, self.token_ids, self.weights, self.temperature

    def check_whole(self) -> None:
        if self.sharded:
            raise ValueError("a policy loss takes whole rows, not columns of them (sharded=True)")


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
        """Stages 1 and 2, and 3 where `dlogits` is given; it may be ``rows.logits``.

        Raises:
            ValueError: ``rows.sharded``.
        """

    def token_logps(
        self, rows: KernelRows, *, logps: Tensor, lse: Tensor, entropy: Tensor | None
    ) -> None:
        """Stage 1. `logps` (N,) and `lse` (N, 2), see lse.py, are float64.

        Of sharded rows `lse` and `entropy` are those of the columns that are there: (0, -inf) and
        0 where these are -inf throughout. ``lse.merge`` says what the shards of a row merge into.
        """

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
        """Stage 3. `dlogits` may be ``rows.logits``.

        Of sharded rows `lse` and `entropy` are those of the whole row, and `dlogits` has the
        gradient of the columns that are there.
        """

    def multiply_rows(self, x: Tensor, factors: Tensor) -> None:
        """x[i] *= factors[i] in place, for x (..., V) and factors (N,); factor 1 costs nothing."""
