"""A linear head and its gradients, a tile of logits at a time: ``z = x W^T + b + u B^T``.

All tiles have as many rows, so that a row's logits do not depend on how many rows are multiplied
beside it. A tile may hold any range of the vocabulary's columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .products import can_write, operand_dtype, product, slices, wide

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
        rooms: for converted operands, by what they are.
    """

    weight: Tensor
    bias: Tensor | None
    lora: Tensor | None
    tile_dtype: torch.dtype
    rounded: torch.dtype
    rooms: dict[str, Tensor] = field(default_factory=dict, compare=False)

    @property
    def n_cols(self) -> int:
        return self.weight.shape[0]

    def project(self, tile: Tensor, x: Tensor, u: Tensor | None, columns: slice) -> None:
        """Fills a tile (n, columns) with the z of x (n, H) and u (n, r)."""
        dtype, step = self._step(columns, tile.dtype, self.weight)
        x, u = x.to(dtype), None if u is None else u.to(dtype)
        for s, part in _parts(columns, step):
            z = tile[:, s]
            if not can_write(dtype, z.dtype):
                z = self._room("tile", z.shape, dtype)
            # What is small comes first: in a low precision each sum is rounded at its size.
            add = self.bias is not None
            if self.bias is not None:
                z.copy_(self.bias[part])
            if self.lora is not None:
                assert u is not None
                product(z, u, self._converted("factor", self.lora[part], dtype).t(), add=add)
                add = True
            product(z, x, self._converted("factor", self.weight[part], dtype).t(), add=add)
            if z.dtype != tile.dtype:
                tile[:, s] = z
        if self.rounded != tile.dtype:
            for s in slices(tile.shape[1], SLICE):
                tile[:, s] = tile[:, s].to(self.rounded)

    def add_gradients(
        self, tile: Tensor, used: int, x: Tensor, u: Tensor | None, columns: slice, to: Gradients
    ) -> None:
        """Adds what a tile (n, columns) of dloss/dz gives.

        Only its first `used` rows count. The others may hold anything: their rows of dx and du mean
        nothing, and are computed because a row's bits may depend on how many there are.
        """
        # Operands of the same dtype are converted once for all products, some columns at a time.
        together: dict[tuple[torch.dtype, int], list[Callable[[slice, slice, Tensor], None]]] = {}
        for total, factor in ((to.x, self.weight), (to.u, self.lora)):
            if total is not None and factor is not None:
                dtype, step = self._step(columns, total.dtype, tile, factor)
                add_rows = partial(self._add_rows, total, factor)
                together.setdefault((dtype, step), []).append(add_rows)
        for pieces, factor in ((to.weight, x), (to.lora, u)):
            if pieces is not None and factor is not None:
                dtype, step = self._step(columns, pieces.pieces[0].dtype, tile, factor)
                add_columns = partial(_add_columns, pieces, factor[:used].to(dtype))
                together.setdefault((dtype, min(step, pieces.step)), []).append(add_columns)
        for (dtype, step), products in together.items():
            for s, part in _parts(columns, step):
                dz = self._converted("tile", tile[:, s], dtype)
                for add in products:
                    add(s, part, dz)
        if to.bias is not None:
            to.bias.add_(tile[:used].sum(0, dtype=to.bias.dtype))

    def _add_rows(self, total: Tensor, factor: Tensor, _: slice, part: slice, dz: Tensor) -> None:
        operand = self._converted("factor", factor[part], dz.dtype)
        product(total, dz, operand, add=total.dtype == wide(total.dtype))

    def _converted(self, place: str, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x if x.dtype == dtype else self._room(place, x.shape, dtype).copy_(x)

    def _room(self, place: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Memory that is used again from product to product."""
        found = self.rooms.get(place)
        if found is None or found.numel() < shape.numel() or found.dtype != dtype:
            found = torch.empty(shape.numel(), dtype=dtype, device=self.weight.device)
            self.rooms[place] = found
        return found[: shape.numel()].view(shape)

    def _step(self, columns: slice, out: torch.dtype, *operands: Tensor) -> tuple[torch.dtype, int]:
        """The dtype that operands of products into `out` need, and how many columns at a time."""
        dtype = operand_dtype(self.weight.dtype, out, self.weight.device)
        converted = any(x.dtype != dtype for x in operands)
        return dtype, SLICE if converted else columns.stop - columns.start


def _add_columns(pieces: Pieces, factor: Tensor, s: slice, _: slice, dz: Tensor) -> None:
    product(pieces.columns(s), dz[: factor.shape[0]].t(), factor, add=pieces.adds)


def _parts(columns: slice, step: int) -> Iterator[tuple[slice, slice]]:
    """The columns in parts, from the tile's first column and from the vocabulary's."""
    for s in slices(columns.stop - columns.start, step):
        yield s, slice(columns.start + s.start, columns.start + s.stop)
