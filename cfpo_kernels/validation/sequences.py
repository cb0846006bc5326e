"""Which sequence each token of a batch is of, padded or packed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..weights import packed_sequence_index, padded_sequence_index
from . import values
from .errors import type_error
from .tensors import active_rows, check_tensor
from .types import PerToken


def sequence_index_of(
    tokens: PerToken, needs: str, cu_seqlens: object | None
) -> tuple[Tensor, int]:
    """(N,) and how many there are.

    `needs` says in the error who wants them.
    """
    source, shape, name = tokens.source, tokens.shape, tokens.name
    got = f"got {name} of shape {tuple(source.shape)}"
    padded, packed = tokens.shape_of("(B, T)"), tokens.shape_of("(N,)")
    if cu_seqlens is not None:
        bounds = check_tensor("cu_seqlens", cu_seqlens, source, "an integer tensor", name)
        if bounds.dtype not in (torch.int64, torch.int32):
            raise type_error("cu_seqlens", bounds, "an int64 or int32 tensor")
        if bounds.dim() != 1 or bounds.shape[0] < 2:
            raise ValueError(f"cu_seqlens must have shape (B + 1,), got {tuple(bounds.shape)}")
        if len(shape) != 1:
            raise ValueError(f"cu_seqlens goes with packed {name} {packed}, {got}")
        n_tokens = shape[0]
        if values.can_be_checked(bounds):
            ends = (int(bounds[0]), int(bounds[-1]))
            if ends != (0, n_tokens) or bool((bounds[1:] < bounds[:-1]).any()):
                raise ValueError(
                    f"cu_seqlens must rise from 0 to the number of tokens, {n_tokens}, "
                    f"got {bounds.tolist() if bounds.numel() <= 8 else ends}"
                )
        return packed_sequence_index(bounds, n_tokens)
    if len(shape) < 2:
        raise ValueError(
            f"{needs} needs sequences: {name} {padded}, or cu_seqlens for packed "
            f"{packed} {name}, {got}"
        )
    return padded_sequence_index(shape, source.device)


@dataclass
class Sequences:
    """How the N tokens of a batch, in order, fall into B sequences."""

    index: Tensor  # (N,) int64, the sequence of each token; rises
    longest: int  # at least the length of the longest one; known without looking at a value
    shape: torch.Size  # of what has one number a sequence
    active: Tensor  # (N,) bool, the mask

    def starts(self) -> Tensor:
        """(N,) int64, where the sequence of each token begins."""
        return torch.searchsorted(self.index, self.index)


def check_sequences(
    name: str, source: Tensor, mask: object, cu_seqlens: object | None
) -> Sequences:
    """The sequences of padded (..., T) or packed (N,) tokens; `source` is "logits" with V more."""
    tokens = PerToken(name, source)
    active = active_rows(mask, tokens)
    if cu_seqlens is None and len(tokens.shape) < 2:
        padded, packed = tokens.shape_of("(B, T)"), tokens.shape_of("(N,)")
        raise ValueError(
            f"{name} must be {padded}, or packed {packed} with cu_seqlens, "
            f"got shape {tuple(source.shape)}"
        )
    index, n = sequence_index_of(tokens, name, cu_seqlens)
    shape = tokens.shape[:-1] if cu_seqlens is None else torch.Size([n])
    return Sequences(index.contiguous(), tokens.shape[-1], shape, active)
