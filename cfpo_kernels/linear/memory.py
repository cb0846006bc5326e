"""Peak memory of a step beyond hidden states and head, in bytes, by what is done with the logits.

The tests measure these; ``python -m cfpo_kernels memory`` prints them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .head import SLICE
from .plan import LEAST_ROWS, default_chunk
from .products import is_fast, wide

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Step:
    """
    Attributes:
        tokens, vocab, hidden: N, V and H, of the whole vocabulary.
        dtype: of hidden states, head and logits.
        chunk: rows of a tile; None: as the functions choose it on the device.
        ranks: processes that the vocabulary is split over, evenly.
        converts: operands are converted by slices, where the device has no fast products of the
            dtype; None: as on this machine's CPU, and not on GPUs.
    """

    tokens: int
    vocab: int
    hidden: int
    dtype: torch.dtype
    device: torch.device
    chunk: int | None = None
    ranks: int = 1
    converts: bool | None = None

    @property
    def rows(self) -> int:
        """Of a tile."""
        chosen = self.chunk or default_chunk(self.vocab, self.dtype, self.device)
        return max(chosen, LEAST_ROWS)

    @property
    def columns(self) -> int:
        """Of one process's part of the vocabulary."""
        return -(-self.vocab // self.ranks)

    @property
    def slice(self) -> int:
        return min(SLICE, self.columns)

    @property
    def wide(self) -> int:
        """Bytes of a number of a sum."""
        return wide(self.dtype).itemsize

    def matrix(self, rows: int, itemsize: int | None = None) -> int:
        """(rows, H)."""
        return rows * self.hidden * (itemsize or self.dtype.itemsize)

    def logits(self, rows: int) -> int:
        return rows * self.columns * self.dtype.itemsize

    def operands(self) -> int:
        """Of a tile's products; where they are converted by slices, two factors and a product."""
        converts = self.converts
        if converts is None:
            converts = not is_fast(self.dtype, self.device)
        converted = 3 * self.slice * max(self.hidden, self.rows) * self.wide
        return self.matrix(self.rows) + (converted if converts else 0)

    @property
    def resident(self) -> bool:
        """Memory that was never written to counts nothing, and pieces go back one by one."""
        return self.device.type == "cpu"


def plain_torch(s: Step) -> int:
    """log_softmax of whole logits in float32: it, two gradients, and the logits."""
    return 3 * s.tokens * s.columns * s.wide + s.logits(s.tokens)


def whole_logits(s: Step, *, inplace: bool) -> int:
    """``cfpo_loss`` of whole logits, with the gradients of hidden states and head."""
    copies = 1 if inplace else 2
    return copies * s.logits(s.tokens) + s.matrix(s.tokens) + s.matrix(s.columns)


def in_forward(s: Step) -> int:
    """Schedule R: a tile (two while shards are exchanged), and both gradients; the head's in
    float32 while there are several tiles."""
    tiles = (1 if s.ranks == 1 else 2) * s.logits(s.rows) + s.operands()
    if s.tokens <= s.rows or s.wide == s.dtype.itemsize:
        return tiles + s.matrix(s.tokens) + s.matrix(s.columns)
    # The tiles are gone when the sum is cast.
    cast = 0 if s.resident else s.matrix(s.columns)
    return s.matrix(s.tokens) + s.matrix(s.columns, s.wide) + max(tiles, cast)


def by_slices(s: Step) -> int:
    """Schedule S: the last tile, a slice of another and of the head's gradient in float32, that of
    hidden states in float32 and in its dtype."""
    tiles = s.logits(s.rows) + s.rows * s.slice * s.dtype.itemsize
    copies = 1 if s.resident else 2  # masked rows are zeros in a copy where nobody counts them
    of_rows = s.matrix(s.tokens, s.wide) + copies * s.matrix(s.tokens)
    return tiles + of_rows + s.matrix(s.columns) + s.matrix(s.slice, s.wide) + s.operands()


def late(s: Step) -> int:
    """Schedule L, of a frozen head: a tile, and the gradient of hidden states."""
    return s.logits(s.rows) + s.matrix(s.tokens) + s.operands()


def scoring(s: Step) -> int:
    """Without a gradient: a tile."""
    return s.logits(s.rows) + s.operands()


def ways(s: Step) -> list[tuple[str, int]]:
    """Each of them by name, and its bytes on each process."""
    return [
        ("plain torch, whole logits, log_softmax in float32", plain_torch(s)),
        ("cfpo_loss, whole logits", whole_logits(s, inplace=False)),
        ("cfpo_loss(inplace=True), whole logits", whole_logits(s, inplace=True)),
        ("linear_cfpo_loss (R)", in_forward(s)),
        ("linear_cfpo_loss(low_memory=True) (S)", by_slices(s)),
        ("linear_token_logps, frozen head (L)", late(s)),
        ("linear_token_logps, no gradient", scoring(s)),
    ]
