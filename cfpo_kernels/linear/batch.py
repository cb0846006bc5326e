"""What a call multiplies: its rows, its head, and the gradients that its tiles add up to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.base import KernelRows
from ..tiles import Scores, Tiles
from ..validation import Rows
from ..vocab_parallel import Shards
from .head import SLICE, Gradients, Head, Pieces
from .plan import Chunk
from .products import operand_dtype, slices, wide


class Parameters(NamedTuple):
    """What a loss from hidden states is differentiable in."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None = None  # (V,)
    u: Tensor | None = None  # (N, r), the adapter's A applied to the hidden states
    lora: Tensor | None = None  # (V, r), its B


@dataclass(frozen=True)
class Batch:
    """
    Attributes:
        rows: of all N tokens; the temperature is that of z.
        dtype, tile_dtype: of the products' operands and of z.
        rounded: which z is rounded to before the softcap.
        softcap: see KernelRows.
        chunk: rows of a tile.
        wanted: the rows that the loss depends on.
        scored: rows whose log-probs and entropies are asked for, and no more.
        has_masked: the chunks hold masked rows too, whose hidden states may be anything.
        accumulates: products are added up in float32, rather than in the parameters' dtype.
    """

    rows: Rows
    dtype: torch.dtype
    tile_dtype: torch.dtype
    rounded: torch.dtype
    softcap: float
    chunk: int
    wanted: list[Chunk]
    scored: list[Chunk]
    has_masked: bool
    tiles: Tiles
    shards: Shards | None
    accumulates: bool

    @property
    def n_rows(self) -> int:
        return self.rows.active.shape[0]

    def head(self, parameters: Parameters) -> Head:
        def operand(x: Tensor) -> Tensor:
            return x.detach().to(self.dtype)

        weight, bias, lora = (
            None if x is None else operand(x if self.shards is None else x[: self.shards.n_cols])
            for x in (parameters.weight, parameters.bias, parameters.lora)
        )
        assert weight is not None
        return Head(weight, bias, lora, self.tile_dtype, self.rounded)

    def new_tile(self, n_cols: int) -> Tensor:
        return torch.empty(
            self.chunk, n_cols, dtype=self.tile_dtype, device=self.rows.active.device
        )

    def operands(self, chunk: Chunk, parameters: Parameters) -> tuple[Tensor, Tensor | None]:
        """x and u of the chunk, with zeros up to a tile's number of rows."""
        missing = self.chunk - chunk.size

        def of(x: Tensor) -> Tensor:
            found = chunk.of(x.detach()).to(self.dtype)
            if self.has_masked:
                found = torch.where(chunk.of(self.rows.active)[:, None], found, 0)
            return torch.nn.functional.pad(found, (0, 0, 0, missing)) if missing else found

        return of(parameters.hidden), None if parameters.u is None else of(parameters.u)

    def kernel_rows(
        self, tile: Tensor, chunk: Chunk, weights: Tensor, columns: slice | None = None
    ) -> KernelRows:
        """`weights`: (N,). `columns`: which of the head's the tile has; None: all."""
        ids, temperature = chunk.of(self.rows.token_ids), self.rows.temperature
        first = (0 if columns is None else columns.start) + (
            self.shards.start if self.shards else 0
        )
        return KernelRows(
            tile[: chunk.size],
            ids - first if first else ids,
            chunk.of(weights),
            chunk.of(temperature) if temperature.numel() > 1 else temperature,
            sharded=columns is not None or self.shards is not None,
            softcap=self.softcap,
        )

    def score(self, tile: Tensor, chunk: Chunk, with_entropy: bool) -> Callable[[], Scores]:
        """Stage 1. What it returns waits for the other shards of the vocabulary."""
        rows = self.kernel_rows(tile, chunk, self.rows.active.to(self.rows.dtype))
        if self.shards is not None:
            return self.shards.score(self.tiles, rows, with_entropy)
        scores = self.tiles.score(rows, with_entropy)
        return lambda: scores


class Sums:
    """The gradients of a call's parameters, as its tiles add up to them.

    Attributes:
        found: of the parameters' shapes and dtypes; None where no gradient is needed.
    """

    def __init__(self, batch: Batch, head: Head, parameters: Parameters, needs: Sequence[bool]):
        self.batch, self.head, self.parameters = batch, head, parameters
        self.needs = Parameters(*needs)  # type: ignore[arg-type]
        hidden, u = (
            _zeros(x) if x is not None and needed else None
            for x, needed in ((parameters.hidden, needs[0]), (parameters.u, needs[3]))
        )
        self.found: list[Tensor | None] = [hidden, None, None, u, None]

    def of_rows(self, *, all_columns: bool) -> Gradients:
        """To add up a tile in, or several tiles of other columns."""
        operand = self.batch.dtype
        one = all_columns and self.head.tile_dtype == operand
        one = one and operand_dtype(operand, operand, self.head.weight.device) == operand

        def new(x: Tensor | None, needed: bool) -> Tensor | None:
            if x is None or not needed:
                return None
            dtype = operand if one else wide(operand)
            return torch.zeros(self.batch.chunk, x.shape[1], dtype=dtype, device=x.device)

        p, needs = self.parameters, self.needs
        return Gradients(x=new(p.hidden, bool(needs.hidden)), u=new(p.u, bool(needs.u)))

    def of_columns(self, columns: slice, *, several: bool) -> Gradients:
        """To add up some columns of the head in, from several tiles or from one."""
        n_cols = columns.stop - columns.start
        dtype = wide(self.batch.dtype) if several and self.batch.accumulates else self.batch.dtype

        def new(place: int) -> Pieces | None:
            like = self.parameters[place]
            if like is None or not self.needs[place]:
                return None
            if dtype == like.dtype:  # in its final place
                gradient = self.found[place]
                if gradient is None:  # columns that nobody asks for are 0
                    gradient = self.found[place] = _zeros(like)
                return Pieces(n_cols, [gradient[columns]], several)
            sizes = [(s.stop - s.start, like.shape[1]) for s in slices(n_cols, SLICE)]
            new_pieces = [torch.zeros(size, dtype=dtype, device=like.device) for size in sizes]
            return Pieces(SLICE, new_pieces, several)

        bias = None
        if self.parameters.bias is not None and self.needs.bias:
            device = self.parameters.bias.device
            bias = torch.zeros(n_cols, dtype=wide(self.batch.dtype), device=device)
        return Gradients(weight=new(1), lora=new(4), bias=bias)

    def put_rows(self, chunk: Chunk, sums: Gradients) -> None:
        for place, total in ((0, sums.x), (3, sums.u)):
            gradient = self.found[place]
            if gradient is not None and total is not None:
                chunk.write(gradient, total[: chunk.size])

    def put_columns(self, start: int, sums: Gradients) -> None:
        """Those from `start` on; the sums are used up."""
        bias = None if sums.bias is None else Pieces(sums.bias.shape[0], [sums.bias], True)
        for place, given in ((1, sums.weight), (2, bias), (4, sums.lora)):
            like = self.parameters[place]
            if given is None or like is None:
                continue
            if place != 2 and given.pieces[0].dtype == like.dtype:
                continue  # in its final place
            gradient, first = self.found[place], start
            if gradient is None:
                gradient = self.found[place] = _zeros(like)
            while given.pieces:
                piece = given.pieces.pop(0)
                gradient[first : first + piece.shape[0]] = piece
                first += piece.shape[0]

    def gradients(self) -> tuple[Tensor | None, ...]:
        return tuple(
            _zeros(x) if found is None and needed and x is not None else found
            for found, needed, x in zip(self.found, self.needs, self.parameters, strict=True)
        )


def _zeros(like: Tensor) -> Tensor:
    """Rows that kernels take, whatever the strides of `like`."""
    return torch.zeros_like(like, memory_format=torch.contiguous_format)
