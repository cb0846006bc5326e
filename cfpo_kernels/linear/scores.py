"""Log-probs and entropies, differentiable: the losses that are not known when a tile's rows are.

Backward goes over the vocabulary in slices, so that the gradient of each is written once, in its
final dtype; logits are multiplied again, all but the last tile's. Where only the hidden states are
differentiated, and by the log-probs only, forward multiplies the gradient of each, and backward
scales the rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..autograd import begin_only_backward, save, saved
from ..tiles import Scores
from .batch import Batch, Parameters, Sums
from .head import SLICE, Head
from .plan import Chunk
from .products import slices, without_autocast


class _All:
    """The scores of all rows; zeros where none are wanted."""

    def __init__(self, batch: Batch, with_entropy: bool) -> None:
        like = batch.rows.active.new_empty(0, dtype=batch.rows.dtype)
        self.entropy = like.new_zeros(batch.n_rows if with_entropy else 0)
        self.logps = like.new_zeros(batch.n_rows, dtype=torch.float64)
        self.lse = like.new_zeros(batch.n_rows, 2, dtype=torch.float64)

    def write(self, chunk: Chunk, scores: Scores) -> None:
        chunk.write(self.logps, scores.logps)
        chunk.write(self.lse, scores.lse)
        if scores.entropy is not None:
            chunk.write(self.entropy, scores.entropy)


def _score_all(
    batch: Batch, head: Head, parameters: Parameters, with_entropy: bool
) -> tuple[_All, Tensor]:
    """And the tile of the last wanted chunk."""
    found, tile = _All(batch, with_entropy), batch.new_tile(head.n_cols)
    waiting = []
    for chunk in (*batch.scored, *batch.wanted):
        head.project(tile, *batch.operands(chunk, parameters), slice(0, head.n_cols))
        waiting.append((chunk, batch.score(tile, chunk, with_entropy)))
    for chunk, scores in waiting:
        found.write(chunk, scores())
    return found, tile


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, batch: Batch, with_entropy: bool, rounded: bool, *given: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        parameters = Parameters(*given)  # type: ignore[arg-type]
        found, ctx.tile = _score_all(batch, batch.head(parameters), parameters, with_entropy)
        save(ctx, found.logps, found.lse, found.entropy, *given)
        ctx.batch, ctx.spent = batch, False
        ctx.mark_non_differentiable(found.lse)
        ctx.set_materialize_grads(False)
        logps = found.logps.to(batch.rows.dtype) if rounded else found.logps
        return logps, found.entropy, found.lse

    @staticmethod
    def backward(
        ctx: Any, dlogps: Tensor | None, dentropy: Tensor | None, _: Any
    ) -> tuple[Tensor | None, ...]:
        dentropy = None if dentropy is None or dentropy.numel() == 0 else dentropy
        if dlogps is None and dentropy is None:
            return (None,) * 8
        begin_only_backward(ctx)
        logps, lse, entropy, *given = saved(ctx)
        batch, parameters = ctx.batch, Parameters(*given)
        tile, ctx.tile = ctx.tile, None
        dlogps = (torch.zeros_like(logps) if dlogps is None else dlogps).to(batch.rows.dtype)
        scores = Scores(logps, lse, entropy if dentropy is not None else None)
        with without_autocast(logps.device):
            head = batch.head(parameters)
            sums = Sums(batch, head, parameters, ctx.needs_input_grad[3:])
            _add_slices(batch, head, parameters, sums, tile, scores, dlogps, dentropy)
        return None, None, None, *sums.gradients()


def _add_slices(
    batch: Batch,
    head: Head,
    parameters: Parameters,
    sums: Sums,
    kept: Tensor,
    scores: Scores,
    dlogps: Tensor,
    dentropy: Tensor | None,
) -> None:
    """`kept`: the logits of the last of the batch's chunks."""
    chunks = batch.wanted
    several = len(chunks) > 1
    operands = [batch.operands(chunk, parameters) for chunk in chunks]
    of_rows = [sums.of_rows(all_columns=not several) for _ in chunks]
    active = batch.rows.active.to(batch.rows.dtype)
    step = SLICE if several else head.n_cols
    fresh = batch.new_tile(min(step, head.n_cols)) if several else kept
    for columns in slices(head.n_cols, step):
        of_columns = sums.of_columns(columns, several=several)
        for i, (chunk, (x, u)) in enumerate(zip(chunks, operands, strict=True)):
            if i == len(chunks) - 1:
                tile = kept[:, columns]
            else:
                tile = fresh[:, : columns.stop - columns.start]
                head.project(tile, x, u, columns)
            rows = batch.kernel_rows(tile, chunk, active, columns if several else None)
            of_chunk = scores.each(chunk.of)
            of_entropy = None if dentropy is None else chunk.of(dentropy).contiguous()
            batch.tiles.gradient_(rows, of_chunk, chunk.of(dlogps).contiguous(), of_entropy)
            to = of_columns._replace(x=of_rows[i].x, u=of_rows[i].u)
            head.add_gradients(tile, chunk.size, x, u, columns, to)
        sums.put_columns(columns.start, of_columns)
    for chunk, total in zip(chunks, of_rows, strict=True):
        sums.put_rows(chunk, total)


class _LateScores(torch.autograd.Function):
    """Differentiated by the log-probs only, and in hidden states (and an adapter's A) only."""

    @staticmethod
    def forward(
        ctx: Any, batch: Batch, with_entropy: bool, rounded: bool, *given: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        parameters = Parameters(*given)  # type: ignore[arg-type]
        head, found = batch.head(parameters), _All(batch, with_entropy)
        sums = Sums(batch, head, parameters, ctx.needs_input_grad[3:])
        tile = batch.new_tile(head.n_cols)
        columns = slice(0, head.n_cols)
        active = batch.rows.active.to(batch.rows.dtype)
        for chunk in batch.scored:
            head.project(tile, *batch.operands(chunk, parameters), columns)
            found.write(chunk, batch.score(tile, chunk, with_entropy)())
        for chunk in batch.wanted:
            x, u = batch.operands(chunk, parameters)
            head.project(tile, x, u, columns)
            scores = batch.score(tile, chunk, with_entropy)()
            found.write(chunk, scores)
            rows = batch.kernel_rows(tile, chunk, active)
            batch.tiles.gradient_(rows, scores, chunk.of(active), None)
            to = sums.of_rows(all_columns=True)
            head.add_gradients(tile, chunk.size, x, u, columns, to)
            sums.put_rows(chunk, to)
        ctx.save_for_backward(batch.rows.active, *sums.gradients())
        ctx.tiles, ctx.dtype, ctx.spent = batch.tiles, batch.rows.dtype, False
        ctx.mark_non_differentiable(found.entropy, found.lse)
        ctx.set_materialize_grads(False)
        logps = found.logps.to(batch.rows.dtype) if rounded else found.logps
        return logps, found.entropy, found.lse

    @staticmethod
    def backward(ctx: Any, dlogps: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if dlogps is None:
            return (None,) * 8
        begin_only_backward(ctx)
        active, *gradients = ctx.saved_tensors
        dlogps = dlogps.to(ctx.dtype)
        factors = torch.where(active, dlogps, 1.0)  # a masked row's zeros, also for inf and NaN
        for gradient in gradients:
            if gradient is not None:
                ctx.tiles.multiply_rows_(gradient.detach(), factors)
        return None, None, None, *gradients


def scores_of(
    batch: Batch, parameters: Parameters, with_entropy: bool, *, entropy_grad: bool, rounded: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """logps (N,), float64 unless `rounded`, differentiable; entropy (N,), likewise if
    `entropy_grad`; lse (N, 2).
    """
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in parameters]
    with without_autocast(parameters.hidden.device):
        if not any(needs):
            with torch.no_grad():
                found, _ = _score_all(batch, batch.head(parameters), parameters, with_entropy)
            logps = found.logps.to(batch.rows.dtype) if rounded else found.logps
            return logps, found.entropy, found.lse
        of_head = needs[1] or needs[2] or needs[4]
        if of_head or (with_entropy and entropy_grad):
            logps, entropy, lse = _Scores.apply(batch, with_entropy, rounded, *parameters)
            return logps, entropy if entropy_grad else entropy.detach(), lse
        return _LateScores.apply(batch, with_entropy, rounded, *parameters)
