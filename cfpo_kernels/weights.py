"""Reductions, all of them: one weight a token, so that the loss is a weighted sum of the rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .plain import filled

REDUCTIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "sum", "none")


def row_weights(
    active: Tensor,
    reduction: str,
    *,
    sequence_index: Tensor | None,
    n_sequences: int,
    normalizer: float | Tensor | None,
    dtype: torch.dtype,
    group: Any = None,
) -> Tensor:
    """w_i with ``loss = sum_i w_i loss_i``; exactly 0 where a token is not active.

    Args:
        active: (N,) bool, the mask.
        sequence_index: (N,) int64, the sequence of each token; only for the seq-* reductions.
        normalizer: replaces the denominator: the number of active tokens ("token-mean"), the
            number of sequences that have one ("seq-mean-*"), or 1 ("sum", "none").
        group: the process group over which each sequence is split; their lengths are summed.

    Returns:
        (N,) of `dtype`. Without any active token all weights are 0, whatever the normalizer.
    """
    numerator = active.to(dtype)
    denominator: Tensor | float = 1.0
    if reduction == "token-mean":
        denominator = active.sum()
    elif reduction.startswith("seq-mean"):
        assert sequence_index is not None  # validation/loss.py
        lengths = torch.zeros(n_sequences, dtype=dtype, device=active.device)
        lengths = lengths.index_add(0, sequence_index, numerator)
        if group is not None:
            torch.distributed.all_reduce(lengths, group=group)
        denominator = (lengths > 0).sum()
        if reduction == "seq-mean-token-mean":
            numerator = numerator / lengths[sequence_index]
    if normalizer is not None:
        denominator = normalizer
    return torch.where(active, numerator / denominator, torch.zeros_like(numerator))


def equal_weights(
    n_tokens: int,
    reduction: str,
    normalizer: float | Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """``row_weights`` where all tokens are active, but for seq-*; to be read only."""
    if normalizer is not None:
        return torch.ones(n_tokens, dtype=dtype, device=device) / normalizer
    count = max(n_tokens, 1) if reduction == "token-mean" else 1
    return filled(n_tokens, 1 / count, dtype, device)


def padded_sequence_index(shape: torch.Size, device: torch.device) -> tuple[Tensor, int]:
    """The sequence of each token of a padded batch (..., T): one a row."""
    n_sequences = shape[:-1].numel()
    index = torch.arange(n_sequences, dtype=torch.int64, device=device)
    index = index[:, None].expand(n_sequences, shape[-1]).reshape(-1)
    return index.contiguous(), n_sequences  # searchsorted warns; of one sequence it is a view


def packed_sequence_index(cu_seqlens: Tensor, n_tokens: int) -> tuple[Tensor, int]:
    """The sequence of each token of a packed batch (N,), from the bounds (B + 1,)."""
    positions = torch.arange(n_tokens, dtype=torch.int64, device=cu_seqlens.device)
    bounds = cu_seqlens.to(torch.int64).contiguous()
    index = torch.searchsorted(bounds, positions, right=True) - 1
    n_sequences = cu_seqlens.shape[0] - 1
    # Bounds that cannot be checked without a device sync must at least not index out of range.
    return index.clamp(0, n_sequences - 1), n_sequences


def suffix_sums(values: Tensor, index: Tensor, longest: int) -> Tensor:
    """(N,): the sum of each token's number and of those after it in its sequence.

    Doubles the reach of a sum log2(longest) times, instead of a cumulative sum over everything: the
    order of additions depends on a token's distance to its sequence's end only, so that a sequence
    has the same bits padded, packed and alone, and a NaN stays where it is. Neither holds for
    atomic additions.
    """
    reach = 1
    while reach < min(longest, values.shape[0]):
        same = index[reach:] == index[:-reach]
        more = torch.where(same, values[reach:], torch.zeros_like(values[reach:]))
        values = torch.cat([values[:-reach] + more, values[-reach:]])
        reach *= 2
    return values


def sequence_totals(values: Tensor, index: Tensor, n_sequences: int, longest: int) -> Tensor:
    """(n_sequences,): the sum of each sequence's numbers; arguments as in packed_sequence_index."""
    sums = suffix_sums(values, index, longest)
    ids = torch.arange(n_sequences, dtype=torch.int64, device=values.device)
    first = torch.searchsorted(index, ids)
    empty = torch.searchsorted(index, ids, right=True) == first
    # A sequence without tokens gets the number behind the last one, a zero.
    first = torch.where(empty, values.shape[0], first)
    return torch.cat([sums, sums.new_zeros(1)])[first]
