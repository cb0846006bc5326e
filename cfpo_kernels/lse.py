"""T * logsumexp(z / T) of rows as two float64, (..., 2): a logit near it, and what it is above it.

As `Lse` in csrc/core/row_types.h: where a token has nearly all the mass, the first is its logit and
the second -T log p of it, which the rounding of their sum would lose.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def scaled(lse: Tensor, temperature: Tensor) -> Tensor:
    """logsumexp(z / T), (...)."""
    return lse.sum(-1) / temperature


class Merged(NamedTuple):
    lse: Tensor  # (n, 2), of whole rows
    gaps: Tensor  # (k, n), (lse - lse_r) / T >= 0; inf where a part has no mass

    def entropy(self, of_parts: Tensor) -> Tensor:
        """(n,) from (k, n): sum_r w_r (H_r + (lse - lse_r) / T), w_r = exp((lse_r - lse) / T)."""
        share = (-self.gaps).exp()
        return in_order(share * (of_parts + torch.where(share == 0, 0.0, self.gaps)))


def merge(parts: Tensor, temperature: Tensor) -> Merged:
    """Of rows whose columns are in k parts, (k, n, 2), in the same order on all processes.

    A NaN is all that counts, and a row without mass stays one. The likeliest part stays out of the
    sum of the others, so that what a likely token of it leaves keeps its relative accuracy.
    """
    totals = parts.sum(-1)
    top = totals.argmax(0, keepdim=True)
    highest = parts.gather(0, top[..., None].expand(1, -1, 2))
    below = torch.where(totals == -torch.inf, totals, (parts - highest).sum(-1) / temperature)
    more = in_order(below.exp().scatter(0, top, 0.0)).log1p()
    anchor, above = highest[0].unbind(-1)
    return Merged(torch.stack([anchor, above + temperature * more], -1), more - below)


def in_order(parts: Tensor) -> Tensor:
    """The sum of (k, n) over k, by halves: elementwise, so that n changes no bit."""
    while parts.shape[0] > 1:
        half = parts.shape[0] // 2
        sums = parts[0 : 2 * half : 2] + parts[1 : 2 * half : 2]
        parts = torch.cat([sums, parts[2 * half :]])
    return parts[0]
