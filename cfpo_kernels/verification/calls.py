"""One call of the kernels for a case.

Outputs are poisoned before it and have memory beside them that has to stay; inputs are looked at
before and after, since nobody may write to them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends.base import Backend
from ..lse import merge
from .cases import Case, Inputs

GUARD = 64  # elements before and behind an output that nobody may write to


@dataclass
class Guarded:
    """An output that is poisoned before the call, with memory beside it that has to stay."""

    memory: Tensor
    view: Tensor

    @classmethod
    def like(cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Guarded:
        size = math.prod(shape)
        memory = torch.empty(size + 2 * GUARD, dtype=dtype, device=device)
        memory.fill_(math.nan)
        return cls(memory, memory[GUARD : GUARD + size].view(shape))

    def was_overrun(self) -> bool:
        ends = torch.cat([self.memory[:GUARD], self.memory[-GUARD:]])
        return not bool(ends.isnan().all())


@dataclass
class Outputs:
    """What a case left; None where the call does not make it."""

    arrays: dict[str, Guarded]
    dlogits: Tensor | None
    untouched: bool  # what is only read was not written to


def _snapshot(inputs: Inputs) -> list[Tensor]:
    named = [*inputs.rows[1:], *inputs.terms[:5], inputs.dlogps, inputs.dentropy, inputs.factors]
    return [x.clone() for x in named if isinstance(x, Tensor)]


def _bits(x: Tensor) -> Tensor:
    return x.reshape(-1).contiguous().view(torch.uint8)


def call(kernels: Backend, case: Case, inputs: Inputs) -> Outputs:
    rows, device, dtype = inputs.rows, inputs.rows.logits.device, inputs.rows.logits.dtype
    n_rows = inputs.kinds.shape[0]
    arrays: dict[str, Guarded] = {}

    def array(name: str, of: torch.dtype = torch.float32, *numbers: int) -> Tensor:
        arrays[name] = Guarded.like((n_rows, *numbers), of, device)
        return arrays[name].view

    before = _snapshot(inputs)
    read_only = None if case.inplace or case.call == "multiply" else rows.logits.clone()
    dlogits: Tensor | None = None
    if case.call in ("train", "on-policy", "backward", "shards", "multiply"):
        if case.inplace:
            dlogits = rows.logits
        else:
            arrays["dlogits"] = Guarded.like(tuple(rows.logits.shape), dtype, device)
            dlogits = arrays["dlogits"].view
    if case.call in ("train", "loss"):
        kernels.policy_loss(
            rows,
            inputs.terms,
            loss=array("loss"),
            logps=array("logps"),
            entropy=array("entropy") if case.everything or case.entropy else None,
            dlogits=dlogits,
        )
    elif case.call == "multiply":
        assert dlogits is not None
        dlogits.copy_(rows.logits)
        kernels.multiply_rows(dlogits, inputs.factors)
    elif case.call == "shards":
        assert dlogits is not None
        entropy = array("entropy") if case.entropy else None
        _call_in_shards(kernels, inputs, array("logps", torch.float64), entropy, dlogits)
    else:
        kernels.token_logps(
            rows,
            logps=array("logps", torch.float64),
            lse=array("lse", torch.float64, 2),
            entropy=array("entropy") if case.entropy else None,
        )
        if case.call == "on-policy":
            kernels.policy_loss(
                rows,
                inputs.terms._replace(
                    inputs=inputs.terms.inputs._replace(old_logps=arrays["logps"].view.float())
                ),
                loss=array("loss"),
                logps=array("trained logps"),
                entropy=None,
                dlogits=dlogits,
            )
        if case.call == "backward":
            assert dlogits is not None
            kernels.token_logps_backward(
                rows,
                lse=arrays["lse"].view,
                entropy=arrays["entropy"].view if case.entropy else None,
                dlogps=inputs.dlogps,
                dentropy=inputs.dentropy,
                dlogits=dlogits,
            )
    untouched = all(
        torch.equal(_bits(x), _bits(y)) for x, y in zip(before, _snapshot(inputs), strict=True)
    )
    if read_only is not None:
        untouched = untouched and torch.equal(_bits(read_only), _bits(rows.logits))
    return Outputs(arrays, dlogits, untouched)


def _call_in_shards(
    kernels: Backend, inputs: Inputs, logps: Tensor, entropy: Tensor | None, dlogits: Tensor
) -> None:
    """What "backward" does, from two halves of the columns; see ``Backend.token_logps``."""
    rows, n_cols = inputs.rows, dlogits.shape[-1]
    middle = n_cols // 16 * 8
    pieces = [piece for piece in (range(middle), range(middle, n_cols)) if piece]
    columns = [slice(piece.start, piece.stop) for piece in pieces]
    shards = [
        rows._replace(
            logits=rows.logits[..., piece], token_ids=rows.token_ids - piece.start, sharded=True
        )
        for piece in columns
    ]
    count, n = len(shards), len(logps)
    their_logps = logps.new_full((count, n), math.nan)
    their_lse = logps.new_full((count, n, 2), math.nan)
    their_entropy = torch.full_like(their_logps, math.nan, dtype=torch.float32)
    for i, shard in enumerate(shards):
        kernels.token_logps(
            shard,
            logps=their_logps[i],
            lse=their_lse[i],
            entropy=None if entropy is None else their_entropy[i],
        )
    merged = merge(their_lse, rows.temperature.double())
    logps.copy_(torch.where(inputs.active, (their_logps - merged.gaps).amax(0), 0.0))
    if entropy is not None:
        entropy.copy_(torch.where(inputs.active, merged.entropy(their_entropy.double()), 0.0))
    for shard, piece in zip(shards, columns, strict=True):
        kernels.token_logps_backward(
            shard,
            lse=merged.lse,
            entropy=entropy,
            dlogps=inputs.dlogps,
            dentropy=inputs.dentropy,
            dlogits=dlogits[..., piece],
        )
