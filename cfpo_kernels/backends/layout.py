"""How rows lie in memory, as the kernels are told."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor


class RowLayout(NamedTuple):
    """Row i starts at ``(i // inner) * outer_stride + (i % inner) * inner_stride`` elements."""

    inner: int
    outer_stride: int
    inner_stride: int


def row_layout(tensor: Tensor) -> RowLayout | None:
    """The layout of the rows of (..., V), or None where they need more than two strides."""
    if tensor.is_contiguous():  # as nearly always
        n_rows = tensor.numel() // tensor.shape[-1]
        return RowLayout(n_rows, 0, tensor.shape[-1] if n_rows > 1 else 0)
    dims: list[tuple[int, int]] = []  # (size, stride), merged where they continue each other
    for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True):
        if size == 1:
            continue
        if dims and dims[-1][1] == size * stride:
            dims[-1] = (dims[-1][0] * size, stride)
        else:
            dims.append((size, stride))
    if len(dims) > 2:
        return None
    inner, inner_stride = dims[-1] if dims else (1, 0)
    return RowLayout(inner, dims[0][1] if len(dims) == 2 else 0, inner_stride)


def row_blocks(*tensors: Tensor, first: int = 0) -> Iterable[tuple[int, Sequence[Tensor]]]:
    """Cuts tensors of one shape (..., V) along leading dimensions until each has a layout.

    Gives the number of the first row and the pieces. Nearly always there is one piece.
    """
    for tensor in tensors:
        if row_layout(tensor) is None:
            return _cut(tensors, first)
    return ((first, tensors),)


def _cut(tensors: Sequence[Tensor], first: int) -> Iterator[tuple[int, Sequence[Tensor]]]:
    rows_each = tensors[0].shape[1:-1].numel()
    for i in range(tensors[0].shape[0]):
        yield from row_blocks(*(tensor[i] for tensor in tensors), first=first + i * rows_each)


def rows_from(x: Tensor | None, first: int) -> Tensor | None:
    """The rest of (N,) from row number `first` on."""
    return x if x is None or first == 0 else x[first:]
