"""The stages of a loss on a tile of logits, which their gradient overwrites; autograd sees nothing.

Rows of weight 0 are not read and get zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from . import backends, reference
from .backends.base import KernelRows, KernelTerms
from .formula import ONE_TOKEN
from .inputs import LossSettings, TokenInputs
from .stage_two import losses_in_torch, token_losses
from .two_pass import Beyond
from .validation import values


class Scores(NamedTuple):
    """Of each row; the entropy is None where nobody asked for it.

    From stage 1 of a kernel, or of shards, log p is float64, unrounded.
    """

    logps: Tensor  # (n,)
    lse: Tensor  # (n, 2), see lse.py
    entropy: Tensor | None  # (n,)

    def each(self, change: Callable[[Tensor], Tensor]) -> Scores:
        """With `change` applied to those that there are."""
        entropy = None if self.entropy is None else change(self.entropy)
        return Scores(change(self.logps), change(self.lse), entropy)


class Tiles(Protocol):
    def loss_(
        self, rows: KernelRows, terms: KernelTerms, with_entropy: bool, with_gradient: bool
    ) -> tuple[Tensor, Scores]:
        """All stages in one pass; the logits hold the gradient afterwards, if it is wanted."""

    def score(self, rows: KernelRows, with_entropy: bool) -> Scores:
        """Stage 1."""

    # Stage 2; see stage_two.token_losses.
    token_losses: ClassVar[Callable[..., Tensor]]

    def gradient_(
        self, rows: KernelRows, scores: Scores, dlogps: Tensor, dentropy: Tensor | None
    ) -> None:
        """Stage 3."""

    def multiply_rows_(self, x: Tensor, factors: Tensor) -> None:
        """x[i] *= factors[i], for x (N, columns); where that is 1 it costs nothing."""


@dataclass(frozen=True)
class KernelTiles:
    token_losses: ClassVar[Callable[..., Tensor]] = staticmethod(token_losses)

    kernels: str  # a name that backends.kernels takes

    def loss_(
        self, rows: KernelRows, terms: KernelTerms, with_entropy: bool, with_gradient: bool
    ) -> tuple[Tensor, Scores]:
        loss, logps, lse, entropy = _outputs(rows, with_entropy, rows.weights.dtype)
        backends.kernels(self.kernels).policy_loss(
            rows,
            terms,
            loss=loss,
            logps=logps,
            entropy=entropy,
            dlogits=rows.logits if with_gradient else None,
        )
        return loss, Scores(logps, lse, entropy)

    def score(self, rows: KernelRows, with_entropy: bool) -> Scores:
        _, logps, lse, entropy = _outputs(rows, with_entropy, torch.float64)
        backends.kernels(self.kernels).token_logps(rows, logps=logps, lse=lse, entropy=entropy)
        return Scores(logps, lse, entropy)

    def gradient_(
        self, rows: KernelRows, scores: Scores, dlogps: Tensor, dentropy: Tensor | None
    ) -> None:
        backends.kernels(self.kernels).token_logps_backward(
            rows,
            lse=scores.lse,
            entropy=scores.entropy if dentropy is not None else None,
            dlogps=dlogps,
            dentropy=dentropy,
            dlogits=rows.logits,
        )

    def multiply_rows_(self, x: Tensor, factors: Tensor) -> None:
        if x.numel():
            backends.kernels(self.kernels).multiply_rows(x, factors.contiguous())


@dataclass(frozen=True)
class ReferenceTiles:
    """Plain torch."""

    token_losses: ClassVar[Callable[..., Tensor]] = staticmethod(losses_in_torch)

    def loss_(
        self, rows: KernelRows, terms: KernelTerms, with_entropy: bool, with_gradient: bool
    ) -> tuple[Tensor, Scores]:
        scores = self.score(rows, with_entropy or terms.settings.needs_entropy)
        loss, dlogps, dentropy = loss_and_slopes(
            self,
            scores,
            rows.weights,
            terms.inputs,
            terms.settings,
            ONE_TOKEN,
            terms.grad_scale,
        )
        if with_gradient:
            self.gradient_(rows, scores, dlogps, dentropy)
        return loss, scores

    def score(self, rows: KernelRows, with_entropy: bool) -> Scores:
        active = rows.weights != 0
        if values.can_be_checked(rows.token_ids) and not rows.sharded:
            shape, n_cols = rows.token_ids.shape, rows.logits.shape[-1]
            values.check_token_range(rows.token_ids, active, n_cols, shape)
        logps, entropy, lse = reference.token_logps(
            rows.logits.reshape(-1, rows.logits.shape[-1]),
            rows.token_ids,
            active,
            rows.temperature,
            with_entropy,
            with_lse=True,
            sharded=rows.sharded,
            softcap=rows.softcap,
        )
        return Scores(logps, lse, entropy if with_entropy else None)

    def gradient_(
        self, rows: KernelRows, scores: Scores, dlogps: Tensor, dentropy: Tensor | None
    ) -> None:
        reference.token_logps_backward_(rows, scores.lse, scores.entropy, dlogps, dentropy)

    def multiply_rows_(self, x: Tensor, factors: Tensor) -> None:
        x.mul_(factors.to(x.dtype)[:, None])


def loss_and_slopes(
    tiles: Tiles,
    scores: Scores,
    weights: Tensor,
    inputs: TokenInputs,
    settings: LossSettings,
    beyond: Beyond,
    grad_scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Stage 2: each row's loss, and the derivatives of their sum times `grad_scale`.

    That by the entropy is None where the loss does not depend on it.
    """
    logps, entropy = scores.logps.detach().requires_grad_(), None
    if settings.needs_entropy or beyond.needs_entropy:
        assert scores.entropy is not None  # its caller
        entropy = scores.entropy.detach().requires_grad_()
    with torch.enable_grad():
        loss = tiles.token_losses(logps, entropy, weights, inputs, settings, beyond)
        total = (loss if grad_scale is None else loss * grad_scale).sum()
    leaves = [logps] if entropy is None else [logps, entropy]
    slopes = torch.autograd.grad(total, leaves, materialize_grads=True)
    dlogps = slopes[0].to(weights.dtype)
    return loss.detach(), dlogps, slopes[1] if entropy is not None else None


def tiles(resolved: str, like: Tensor) -> Tiles:
    """Of a name that ``backends.resolve`` gives, for tensors of this kind.

    Kernels get addresses, and fake tensors have none: torch knows what shapes come out.
    """
    if resolved == backends.REFERENCE or is_fake(like):
        return ReferenceTiles()
    return KernelTiles(resolved)


def _outputs(
    rows: KernelRows, with_entropy: bool, of_logps: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    like = rows.weights
    entropy = torch.empty_like(like) if with_entropy else None
    lse = like.new_empty(len(like), 2, dtype=torch.float64)
    return torch.empty_like(like), torch.empty_like(like, dtype=of_logps), lse, entropy
