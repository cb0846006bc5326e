"""Memory that costs nothing until it is touched."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python 3.10 does not know it


def sparse(numel: int, dtype: torch.dtype) -> Tensor:
    """Zeros, (numel,), of which the machine holds the pages that were written.

    For offsets beyond 2**31 elements: more than the machine's memory can be had.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    return torch.frombuffer(mmap.mmap(-1, numel * dtype.itemsize, flags=flags), dtype=dtype)
