"""How a resolved backend computes: one implementation over all kernels, one in plain torch.

What a backend can do is asked of its runner; nobody else compares names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from . import backends, ops, reference
from .autograd import CFPOFunction, LossCall, TokenLogpsFunction
from .backends.base import KernelRows, KernelTerms
from .formula import loss_of_logps
from .stage_two import losses_in_torch, token_losses
from .tiles import Tiles
from .transforms import refuse_guarded_views
from .validation import LossTerms, Rows, values
from .vocab_parallel import ShardedLogpsFunction, Shards


class Runner(Protocol):
    """Stage 1, and a whole loss; of rows, as (N,) tensors that autograd knows."""

    takes_float64: ClassVar[bool]
    # The gradient may take the logits' memory.
    overwrites: ClassVar[bool]
    # It has a loss of its own; otherwise one is made of the scores.
    one_pass: ClassVar[bool]
    # Autograd goes through it as often as wanted, forwards too.
    differentiates_twice: ClassVar[bool]

    @property
    def runs_triton(self) -> bool:
        """Whether it takes objectives that are written in Triton."""

    def score(
        self,
        rows: Rows,
        inplace: bool,
        with_entropy: bool,
        with_lse: bool = False,
        rounded: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """logps and entropy, differentiable; T * logsumexp(logits / T). (0,) if not asked for.

        rounded: logps to the rows' dtype; otherwise kernels give them in float64.
        """

    @property
    def token_losses(self) -> Callable[..., Tensor]:
        """Stage 2; see ``stage_two.token_losses``."""

    def loss(
        self, rows: Rows, terms: LossTerms, inplace: bool, with_scores: bool, summed: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The loss, 0-d if `summed`, differentiable; logps and entropy, there `with_scores`. For
        terms that look at one token only."""


@dataclass(frozen=True)
class KernelRunner:
    """Over the operators."""

    takes_float64: ClassVar[bool] = False
    overwrites: ClassVar[bool] = True
    one_pass: ClassVar[bool] = True
    differentiates_twice: ClassVar[bool] = False

    token_losses: ClassVar[Callable[..., Tensor]] = staticmethod(token_losses)

    kernels: str  # a name that backends.kernels takes

    @property
    def runs_triton(self) -> bool:
        return self.kernels == "triton"

    def score(
        self,
        rows: Rows,
        inplace: bool,
        with_entropy: bool,
        with_lse: bool = False,
        rounded: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits = rows.logits
        of_rows = (rows.token_ids, rows.active.to(rows.dtype), rows.temperature)
        if logits.requires_grad and torch.is_grad_enabled():
            if inplace:
                refuse_guarded_views(logits, now=False)
            return TokenLogpsFunction.apply(
                logits, inplace, rounded, *of_rows, with_entropy, self.kernels
            )
        logps, lse, entropy = ops.run_token_scores(
            KernelRows(logits, *of_rows), with_entropy, self.kernels
        )
        return logps.to(rows.dtype) if rounded else logps, entropy, lse

    def loss(
        self, rows: Rows, terms: LossTerms, inplace: bool, with_scores: bool, summed: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        logits = rows.logits
        of_rows = (logits, rows.token_ids, terms.weights, rows.temperature)
        of_tokens = KernelTerms(terms.inputs, terms.settings, terms.grad_scale)
        if logits.requires_grad and torch.is_grad_enabled():
            if inplace:
                refuse_guarded_views(logits, now=True)
            how = LossCall(self.kernels, summed, rows.mask is not None, with_scores, inplace)
            return CFPOFunction.apply(*of_rows, of_tokens, how)
        loss, logps, entropy, _ = ops.run_policy_loss(
            KernelRows(*of_rows), of_tokens, with_scores, self.kernels
        )
        return loss.sum() if summed else loss, logps, entropy


@dataclass(frozen=True)
class ReferenceRunner:
    """Plain torch."""

    takes_float64: ClassVar[bool] = True
    overwrites: ClassVar[bool] = False
    one_pass: ClassVar[bool] = True
    differentiates_twice: ClassVar[bool] = True
    token_losses: ClassVar[Callable[..., Tensor]] = staticmethod(losses_in_torch)

    @property
    def runs_triton(self) -> bool:
        return False

    def score(
        self,
        rows: Rows,
        inplace: bool,
        with_entropy: bool,
        with_lse: bool = False,
        rounded: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits, ids = rows.logits, rows.token_ids
        # The kernels check the ids themselves, when they run: compiled code gets there unchecked.
        if values.can_be_checked(ids):
            values.check_token_range(ids, rows.active, logits.shape[-1], rows.shape)
        flat = logits.reshape(-1, logits.shape[-1])
        return reference.token_logps(
            flat, ids, rows.active, rows.temperature, with_entropy, with_lse
        )

    def loss(
        self, rows: Rows, terms: LossTerms, inplace: bool, with_scores: bool, summed: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        with_entropy = with_scores or terms.settings.needs_entropy
        logps, entropy, _ = self.score(rows, inplace, with_entropy)
        loss = loss_of_logps(logps, entropy, terms.weights, terms.inputs, terms.settings)
        return loss.sum() if summed else loss, logps, entropy


@dataclass(frozen=True)
class ShardedRunner:
    """Over the stages, with an exchange between the first and the second."""

    takes_float64: ClassVar[bool] = False
    overwrites: ClassVar[bool] = True
    one_pass: ClassVar[bool] = False
    differentiates_twice: ClassVar[bool] = False

    tiles: Tiles
    shards: Shards

    @property
    def token_losses(self) -> Callable[..., Tensor]:
        return self.tiles.token_losses

    @property
    def runs_triton(self) -> bool:
        return False  # no objective that needs one pass

    def score(
        self,
        rows: Rows,
        inplace: bool,
        with_entropy: bool,
        with_lse: bool = False,
        rounded: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if values.can_be_checked(rows.token_ids):
            values.check_token_range(
                rows.token_ids, rows.active, self.shards.vocab_size, rows.shape
            )
        if inplace:
            refuse_guarded_views(rows.logits, now=False)
        logits = rows.logits.reshape(-1, rows.logits.shape[-1])[:, : self.shards.n_cols]
        return ShardedLogpsFunction.apply(
            logits,
            inplace,
            rounded,
            rows.token_ids - self.shards.start,
            rows.active.to(rows.dtype),
            rows.temperature,
            with_entropy,
            self.tiles,
            self.shards,
        )

    def loss(
        self, rows: Rows, terms: LossTerms, inplace: bool, with_scores: bool, summed: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        raise NotImplementedError("one_pass is False")


_REFERENCE = ReferenceRunner()


def runner(resolved: str) -> Runner:
    """Of a name that ``backends.resolve`` gives."""
    return _REFERENCE if resolved == backends.REFERENCE else KernelRunner(resolved)


def may_overwrite(name: str) -> bool:
    """Whether inplace=True goes with a backend asked for by this name; with "auto" it does."""
    return runner(name).overwrites
