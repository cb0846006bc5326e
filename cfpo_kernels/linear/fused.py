"""Gradients in forward, rows by rows: three products, of which none is made twice.

For losses that are known when a tile's rows are: of one token each, or of sequences that a tile
holds whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..autograd import begin_only_backward
from ..backends.base import KernelTerms
from ..tiles import Scores, loss_and_slopes
from ..validation import LossTerms
from .batch import Batch, Parameters, Sums
from .plan import Chunk
from .products import without_autocast


class _Tile(NamedTuple):
    """A tile whose logits are known, and what waits for their scores."""

    logits: Tensor
    chunk: Chunk
    x: Tensor
    u: Tensor | None
    scores: Callable[[], Scores] | None  # None: the loss takes one pass


class _Fused:
    def __init__(
        self,
        batch: Batch,
        terms: LossTerms,
        parameters: Parameters,
        needs: Sequence[bool],
        with_entropy: bool,
    ) -> None:
        self.batch, self.terms, self.parameters = batch, terms, parameters
        self.with_entropy = with_entropy
        self.one_pass = not terms.beyond and batch.shards is None
        self.with_gradient = any(needs)
        self.head = batch.head(parameters)
        self.sums = Sums(batch, self.head, parameters, needs)
        several = len(batch.wanted) > 1
        self.of_columns = self.sums.of_columns(slice(0, self.head.n_cols), several=several)
        self.loss, self.logps, self.entropy = (torch.zeros_like(terms.weights) for _ in range(3))

    def run(self) -> None:
        # While the shards of one tile are exchanged, the next one is multiplied.
        tiles = [self.batch.new_tile(self.head.n_cols)]
        if self.batch.shards is not None:
            tiles.append(self.batch.new_tile(self.head.n_cols))
        waiting: list[_Tile] = []
        for i, chunk in enumerate(self.batch.wanted):
            waiting.append(self.project(tiles[i % len(tiles)], chunk))
            if len(waiting) == len(tiles):
                self.finish(waiting.pop(0))
        for tile in waiting:
            self.finish(tile)
        for chunk in self.batch.scored:
            tile = self.project(tiles[0], chunk)
            scores = (tile.scores or self.batch.score(tile.logits, chunk, True))()
            self.keep(chunk, scores)

    def gradients(self) -> tuple[Tensor | None, ...]:
        """After `run`, whose tiles need no memory any more."""
        self.sums.put_columns(0, self.of_columns)
        return self.sums.gradients()

    def project(self, logits: Tensor, chunk: Chunk) -> _Tile:
        x, u = self.batch.operands(chunk, self.parameters)
        self.head.project(logits, x, u, slice(0, self.head.n_cols))
        scores = None if self.one_pass else self.batch.score(logits, chunk, self.needs_entropy)
        return _Tile(logits, chunk, x, u, scores)

    @property
    def needs_entropy(self) -> bool:
        return self.with_entropy or self.terms.settings.needs_entropy

    def finish(self, tile: _Tile) -> None:
        """Stages 2 and 3, and the products of the gradient."""
        batch, terms, chunk = self.batch, self.terms, tile.chunk
        rows = batch.kernel_rows(tile.logits, chunk, terms.weights)
        inputs = terms.inputs.each(chunk.of)
        if tile.scores is None:
            kernel_terms = KernelTerms(inputs, terms.settings, terms.grad_scale)
            loss, scores = batch.tiles.loss_(
                rows, kernel_terms, self.with_entropy, self.with_gradient
            )
        else:
            scores, ratio = tile.scores(), terms.beyond.ratio
            if ratio is not None:
                # Of tokens that are left out nothing is known, but on a CPU.
                n_sequences = None if chunk.index is not None else chunk.size // ratio.longest
                ratio = ratio.of(chunk.of, n_sequences)
            beyond = terms.beyond._replace(ratio=ratio)
            loss, dlogps, dentropy = loss_and_slopes(
                batch.tiles,
                scores,
                rows.weights,
                inputs,
                terms.settings,
                beyond,
                terms.grad_scale,
            )
            if self.with_gradient:
                batch.tiles.gradient_(rows, scores, dlogps, dentropy)
        chunk.write(self.loss, loss)
        self.keep(chunk, scores)
        if not self.with_gradient:
            return
        of_rows = self.sums.of_rows(all_columns=True)
        to = self.of_columns._replace(x=of_rows.x, u=of_rows.u)
        columns = slice(0, self.head.n_cols)
        self.head.add_gradients(tile.logits, chunk.size, tile.x, tile.u, columns, to)
        self.sums.put_rows(chunk, of_rows)

    def keep(self, chunk: Chunk, scores: Scores) -> None:
        chunk.write(self.logps, scores.logps)
        if scores.entropy is not None:
            chunk.write(self.entropy, scores.entropy)


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, batch: Batch, terms: LossTerms, with_entropy: bool, *parameters: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        given = Parameters(*parameters)  # type: ignore[arg-type]
        run = _Fused(batch, terms, given, ctx.needs_input_grad[3:], with_entropy)
        run.run()
        ctx.save_for_backward(terms.grad_scale, terms.weights, *run.gradients())
        ctx.tiles, ctx.spent = batch.tiles, False
        ctx.mark_non_differentiable(run.logps, run.entropy)
        ctx.set_materialize_grads(False)
        return run.loss.sum(), run.logps, run.entropy

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if dloss is None:
            return (None,) * 8
        begin_only_backward(ctx)
        grad_scale, weights, *gradients = ctx.saved_tensors
        factor = dloss if grad_scale is None else dloss / grad_scale
        # What masked rows gave stays 0, also for inf and NaN.
        factor = torch.where((weights != 0).any(), factor, 1.0)
        of_rows = torch.where(weights == 0, 1.0, factor)
        for name, gradient in zip(Parameters._fields, gradients, strict=True):
            if gradient is not None:
                rows = torch.atleast_2d(gradient.detach())
                factors = of_rows if name in ("hidden", "u") else factor.expand(rows.shape[0])
                ctx.tiles.multiply_rows_(rows, factors)
        return None, None, None, *gradients


def fused_loss(
    batch: Batch, terms: LossTerms, parameters: Parameters, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of the rows' losses, differentiable; logps and entropy (N,), 0 where not wanted."""
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in parameters):
        with without_autocast(parameters.hidden.device):
            return _FusedLoss.apply(batch, terms, with_entropy, *parameters)
    with torch.no_grad(), without_autocast(parameters.hidden.device):
        run = _Fused(batch, terms, parameters, (False,) * 5, with_entropy)
        run.run()
        return run.loss.sum(), run.logps, run.entropy
