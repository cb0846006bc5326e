"""A linear head and its gradients, a tile of logits at a time: ``z = x W^T + b + u B^T``.

All tiles have as many rows, so that a row's logits do not depend on how many rows are multiplied
beside it. A tile may hold any range of the vocabulary's columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .products import operand_dtype, product, slices, wide

SLICE = 8192  # columns of the vocabulary whose operands are converted at a time


class Pieces(NamedTuple):
    """A gradient (columns, k) in pieces of `step` columns, each of which can be freed by itself."""

    step: int
    pieces: list[Tensor]
    adds: bool  # products are added up; otherwise each column gets one

    def columns(self, s: slice) -> Tensor:
        """Those of one piece."""
        start = s.start % self.step
        return self.pieces[s.start // self.step][start : start + s.stop - s.start]


class Gradients(NamedTuple):
    """What tiles are added up in; None where not wanted. All that is added to starts as 0."""

    x: Tensor | None = None  # (n, H); one product if of a lower dtype than float32
    u: Tensor | None = None  # (n, r), likewise
    weight: Pieces | None = None  # (columns, H)
    lora: Pieces | None = None  # (columns, r)
    bias: Tensor | None = None  # (columns,)


@dataclass(frozen=True)
class Head:
    """Detached parameters, in the dtype of the products' operands.

    Attributes:
        weight: (V, H).
        bias: (V,), or None.
        lora: (V, r), the B of an adapter, or None.
        tile_dtype: of z.
        rounded: which z is rounded to.
    """

    weight: Tensor
    bias: Tensor | None
    lora: Tensor | None
    tile_dtype: torch.dtype
    rounded: torch.dtype

    @property
    def n_cols(self) -> int:
        return self.weight.shape[0]

    def project(self, tile: Tensor, x: Tensor, u: Tensor | None, columns: slice) -> None:
        """Fills a tile (n, columns) with the z of x (n, H) and u (n, r)."""
        dtype, step = self._step(columns, tile.dtype, self.weight)
        for s, part in _parts(columns, step):
            product(tile[:, s], x.to(dtype), self.weight[part].to(dtype).t())
            if self.lora is not None:
                assert u is not None
                product(tile[:, s], u.to(dtype), self.lora[part].to(dtype).t(), add=True)
        if self.bias is not None:
            tile += self.bias[columns]
        if self.rounded != tile.dtype:
            for s in slices(tile.shape[1], SLICE):
                tile[:, s] = tile[:, s].to(self.rounded)

    def add_gradients(
        self, tile: Tensor, x: Tensor, u: Tensor | None, columns: slice, to: Gradients
    ) -> None:
        """Adds what a tile (n, columns) of dloss/dz gives, whose unused rows are 0."""
        for total, factor in ((to.x, self.weight), (to.u, self.lora)):
            if total is not None and factor is not None:
                dtype, step = self._step(columns, total.dtype, tile, factor)
                add = total.dtype == wide(total.dtype)
                for s, part in _parts(columns, step):
                    product(total, tile[:, s].to(dtype), factor[part].to(dtype), add=add)
        for pieces, factor in ((to.weight, x), (to.lora, u)):
            if pieces is not None and factor is not None:
                dtype, step = self._step(columns, pieces.pieces[0].dtype, tile, factor)
                for s, _ in _parts(columns, min(step, pieces.step)):
                    gradient = tile[:, s].t().to(dtype)
                    product(pieces.columns(s), gradient, factor.to(dtype), add=pieces.adds)
        if to.bias is not None:
            to.bias.add_(tile.sum(0, dtype=to.bias.dtype))

    def _step(self, columns: slice, out: torch.dtype, *operands: Tensor) -> tuple[torch.dtype, int]:
        """The dtype that operands of products into `out` need, and how many columns at a time."""
        dtype = operand_dtype(self.weight.dtype, out, self.weight.device)
        converted = any(x.dtype != dtype for x in operands)
        return dtype, SLICE if converted else columns.stop - columns.start


def _parts(columns: slice, step: int) -> Iterator[tuple[slice, slice]]:
    """The columns in parts, from the tile's first column and from the vocabulary's."""
    for s in slices(columns.stop - columns.start, step):
        yield s, slice(columns.start + s.start, columns.start + s.stop)
