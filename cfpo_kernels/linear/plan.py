"""Which rows are multiplied, and in which tiles."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..validation import values

# A product of 128 rows costs 1.2 times as much a row as one of 512 on a CPU (docs/linear.md), and a
# call with few rows costs one product.
CPU_ROWS, GPU_ROWS = 128, 1024
# With fewer rows MKL's products in float32 depend on where in the tile a row is.
LEAST_ROWS = 16
MOST_ROWS = 1 << 24  # a tile of more would have a size that overflows before memory ends
TILE_BYTES = 1 << 30


def default_chunk(n_cols: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows of a product: from what does not change between scoring and training."""
    most = CPU_ROWS if device.type == "cpu" else GPU_ROWS
    fitting = TILE_BYTES // (n_cols * dtype.itemsize)
    return max(128, min(most, fitting // 128 * 128))


@dataclass(frozen=True)
class Chunk:
    """The rows of a tile, of which the first are used.

    Attributes:
        index: (m,) int64, which of the call's rows; None: those from `start` on.
    """

    index: Tensor | None
    start: int
    size: int  # m

    def of(self, x: Tensor) -> Tensor:
        """Its rows of (N, ...)."""
        if self.index is not None:
            return x.index_select(0, self.index)
        return x[self.start : self.start + self.size]

    def write(self, x: Tensor, values: Tensor) -> None:
        """Sets its rows of (N, ...)."""
        if self.index is not None:
            x.index_copy_(0, self.index, values.to(x.dtype))
        else:
            x[self.start : self.start + self.size] = values


def in_order(index: Tensor | None, n_rows: int, chunk: int) -> list[Chunk]:
    """All of `index`, or all rows where it is None."""
    size = n_rows if index is None else index.shape[0]
    return [
        Chunk(None if index is None else index[start : start + chunk], start, stop - start)
        for start in range(0, size, chunk)
        for stop in (min(start + chunk, size),)
    ]


def by_sequence(index: Tensor, sequences: Tensor, chunk: int) -> list[Chunk] | None:
    """Whole sequences in each chunk: the longest first, each where it fits first.

    Args:
        index: (m,) int64, rows in order; sequences: (m,) int64, which each is of. On a CPU.

    Returns:
        None where a sequence is longer than a chunk.
    """
    _, inverse, counts = torch.unique_consecutive(
        sequences, return_inverse=True, return_counts=True
    )
    lengths = counts.tolist()
    if not lengths:
        return []
    if max(lengths) > chunk:
        return None
    free: list[int] = []
    place = [0] * len(lengths)
    for sequence in sorted(range(len(lengths)), key=lambda s: -lengths[s]):
        length = lengths[sequence]
        fitting = [i for i, left in enumerate(free) if length <= left]
        if not fitting:
            fitting = [len(free)]
            free.append(chunk)
        place[sequence] = fitting[0]
        free[fitting[0]] -= length
    places = torch.tensor(place, dtype=torch.int64, device="cpu")[inverse]
    rows_of = (index[places == i] for i in range(len(free)))
    return [Chunk(rows, 0, rows.shape[0]) for rows in rows_of]


@dataclass(frozen=True)
class Selection:
    """The rows that are multiplied.

    Attributes:
        index: (m,) int64, ascending; None: all.
        scored: those of which scores are asked for and no more.
        has_masked: `index` has masked rows too.
        too_many: 0-d bool, more rows are wanted than there is room for; None: surely not.
    """

    index: Tensor | None
    scored: Tensor
    has_masked: bool
    too_many: Tensor | None = None


def select(
    active: Tensor, idle: Tensor | None, with_scores: bool, active_tokens: int | None
) -> Selection:
    """Leaves out masked and idle rows where that needs no device sync.

    Args:
        active: (N,) bool, the mask. idle: (N,) bool, the rows whose loss is 0 anyway, or None.
        with_scores: scores of idle rows are asked for.
        active_tokens: how many rows there is room for; None: as many as there are.
    """
    wanted = active if idle is None else active & ~idle
    none = torch.empty(0, dtype=torch.int64, device=active.device)
    if active_tokens is not None:
        active_tokens = min(active_tokens, active.shape[0])
        kept = active if with_scores else wanted
        first = torch.argsort(~kept, stable=True)[:active_tokens]
        return Selection(first.sort().values, none, True, kept.sum() > active_tokens)
    if not values.can_be_looked_at(active):
        return Selection(None, none, True)
    scored = (active & ~wanted).nonzero()[:, 0] if with_scores else none
    return Selection(None if wanted.all() else wanted.nonzero()[:, 0], scored, False)
