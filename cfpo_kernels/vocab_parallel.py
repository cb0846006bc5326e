"""A vocabulary that is split over the processes of a group, each with some of the head's rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .autograd import refuse_create_graph
from .backends.base import KernelRows
from .tiles import Scores, Tiles
from .validation.errors import type_error

REDUCTIONS = ("all_reduce", "reduce_scatter", "none")


@dataclass(frozen=True)
class VocabParallel:
    """How the vocabulary is split over a process group.

    Args:
        group: of ``torch.distributed``; all of its processes make the same calls with the same
            token ids, masks and numbers.
        start: the first token id of this process's part of the vocabulary; any number of columns.
        vocab_size: of all processes together. Columns from there on are padding: they are no part
            of the softmax, and their gradient is 0.
        reduce_hidden_grad: how the parts of the hidden states' gradient, one a process, become
            that of the sum. "all_reduce": here, and each process gets all of it. "reduce_scatter":
            the hidden states given are this process's tokens only (sequence parallel), split in
            order along the first dimension; they are gathered here, and their gradient is summed
            and split. "none": by the caller, as after Megatron's
            ``copy_to_tensor_model_parallel_region`` or with a DTensor's partial placement.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value.

    Example:
        >>> store = torch.distributed.HashStore()  # one process, which has all columns
        >>> torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> split = VocabParallel(torch.distributed.group.WORLD, start=0, vocab_size=3)
        >>> logits = torch.zeros(2, 4)  # the last column is padding
        >>> cfpo_kernels.token_logps(logits, torch.tensor([0, 2]), vocab_parallel=split).exp()
        tensor([0.3333, 0.3333])
        >>> torch.distributed.destroy_process_group()
    """

    group: Any
    start: int
    vocab_size: int
    reduce_hidden_grad: str = "all_reduce"

    def __post_init__(self) -> None:
        for name in ("start", "vocab_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise type_error(name, value, "an integer")
        if self.vocab_size < 1 or self.start < 0:
            raise ValueError(
                "VocabParallel needs start >= 0 and vocab_size >= 1, "
                f"got {self.start} and {self.vocab_size}"
            )
        if self.reduce_hidden_grad not in REDUCTIONS:
            raise ValueError(
                f"reduce_hidden_grad must be one of {', '.join(map(repr, REDUCTIONS))}, "
                f"got {self.reduce_hidden_grad!r}"
            )


@dataclass(frozen=True)
class Shards:
    """This process's columns [start, start + n_cols) of a vocabulary of `vocab_size`."""

    group: Any
    start: int
    n_cols: int
    vocab_size: int

    @staticmethod
    def of(given: object, n_cols: int) -> Shards:
        """Of a VocabParallel, and as many columns as this process has with padding."""
        if not isinstance(given, VocabParallel):
            raise type_error("vocab_parallel", given, "a VocabParallel")
        kept = min(n_cols, given.vocab_size - given.start)
        if kept < 1:
            raise ValueError(
                "vocab_parallel needs a column of the vocabulary on each process, got "
                f"start={given.start} of vocab_size={given.vocab_size}"
            )
        return Shards(given.group, given.start, kept, given.vocab_size)

    def exchange(self, rows: KernelRows, scores: Scores) -> Callable[[], Scores]:
        """Sends what this shard knows of each row; what it returns waits for the others' and
        merges, in the order of ranks, so that all processes have the same bits.
        """
        active = rows.weights != 0
        temperature = torch.where(active, rows.temperature, 1.0).double()
        here = (rows.token_ids >= 0) & (rows.token_ids < self.n_cols)
        ids = rows.token_ids + self.start
        picked = rows.logits.gather(1, torch.where(here, rows.token_ids, 0)[:, None]).squeeze(1)
        logit = torch.where(here, picked.double() / temperature, -torch.inf)
        entropy = scores.lse.new_zeros(()) if scores.entropy is None else scores.entropy
        mine = torch.stack([scores.lse / temperature, logit, entropy.double().expand_as(logit)])
        everyone = [torch.empty_like(mine) for _ in range(self.group.size())]
        work = torch.distributed.all_gather(everyone, mine, group=self.group, async_op=True)

        def merged() -> Scores:
            work.wait()
            lses, logits, entropies = torch.stack(everyone).unbind(1)
            lse = lses.logsumexp(0)
            logps = logits.amax(0) - lse
            known = (ids >= 0) & (ids < self.vocab_size)
            logps = torch.where(active, torch.where(known, logps, torch.nan), 0.0)
            share = (lses - lse).exp()
            parts = torch.where(share == 0, 0.0, share * (entropies + (lse - lses)))
            dtype = rows.weights.dtype
            return Scores(
                logps.to(dtype),
                torch.where(active, lse * temperature, 0.0),
                None if scores.entropy is None else parts.sum(0).to(dtype),
            )

        return merged


class ShardedLogpsFunction(torch.autograd.Function):
    """As ``autograd.TokenLogpsFunction``, for one shard of the logits."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        inplace: bool,
        token_ids: Tensor,
        weights: Tensor,
        temperature: Tensor,
        with_entropy: bool,
        tiles: Tiles,
        shards: Shards,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = KernelRows(logits.detach(), token_ids, weights, temperature, sharded=True)
        logps, lse, entropy = shards.exchange(rows, tiles.score(rows, with_entropy))()
        entropy = logps.new_empty(0) if entropy is None else entropy
        ctx.save_for_backward(logits, *rows[1:4], logps, lse, entropy)
        ctx.inplace, ctx.tiles = inplace, tiles
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return logps, entropy, lse

    @staticmethod
    def backward(
        ctx: Any, dlogps: Tensor | None, dentropy: Tensor | None, _: Any
    ) -> tuple[Tensor | None, ...]:
        dentropy = None if dentropy is None or dentropy.numel() == 0 else dentropy
        if dlogps is None and dentropy is None:
            return (None,) * 8
        refuse_create_graph()
        logits, token_ids, weights, temperature, logps, lse, entropy = ctx.saved_tensors
        dlogps = torch.zeros_like(logps) if dlogps is None else dlogps.contiguous()
        dlogits = logits.detach() if ctx.inplace else logits.detach().clone()
        ctx.tiles.gradient_(
            KernelRows(dlogits, token_ids, weights, temperature, sharded=True),
            Scores(logps, lse, None if dentropy is None else entropy),
            dlogps,
            None if dentropy is None else dentropy.contiguous(),
        )
        if ctx.inplace:
            torch.autograd.graph.increment_version(logits)
        return dlogits, *(None,) * 7


class _Copied(torch.autograd.Function):
    """Each process uses the same tensor; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        total = dx.to(torch.promote_types(dx.dtype, torch.float32), copy=True)
        torch.distributed.all_reduce(total, group=ctx.group)
        return total.to(dx.dtype), None


class _Gathered(torch.autograd.Function):
    """Each process has some rows and uses all; its rows' gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(group.size())]
        torch.distributed.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        total = dx.to(torch.promote_types(dx.dtype, torch.float32)).contiguous()
        mine = total.new_empty(dx.shape[0] // ctx.group.size(), *dx.shape[1:])
        torch.distributed.reduce_scatter(mine, list(total.chunk(ctx.group.size())), group=ctx.group)
        return mine.to(dx.dtype), None


def shared_by_all(hidden: Tensor, given: VocabParallel) -> Tensor:
    """The hidden states of all tokens, with the gradient that ``reduce_hidden_grad`` asks for."""
    if given.reduce_hidden_grad == "all_reduce":
        return _Copied.apply(hidden, given.group)
    if given.reduce_hidden_grad == "reduce_scatter":
        return _Gathered.apply(hidden, given.group)
    return hidden


def from_dtensors(
    hidden: Any, weight: Any, bias: Any, lora: Any
) -> tuple[Tensor, Tensor, Tensor | None, tuple[Tensor, Tensor] | None, VocabParallel]:
    """The local tensors of a head that is split over the rows of a tensor-parallel mesh.

    The hidden states (and an adapter's u), whole on each process or split by tokens, get gradients
    of their own placement; so do the weight and the bias (and the adapter's B).
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    mesh, vocab_size = weight.device_mesh, weight.shape[0]

    def checked(name: str, x: Any) -> Any:
        if not isinstance(x, DTensor) or x.device_mesh != mesh or mesh.ndim != 1:
            raise ValueError(
                f"{name} must be a DTensor on the weight's mesh, and that of one dimension; "
                "otherwise pass local tensors and vocab_parallel="
            )
        return x

    def of_tokens(name: str, x: Any) -> Tensor:
        replicated = checked(name, x).redistribute(placements=[Replicate()])
        return replicated.to_local(grad_placements=[Partial()])

    def of_columns(name: str, x: Any) -> Tensor:
        if tuple(checked(name, x).placements) != (Shard(0),):
            raise ValueError(
                f"{name} must be split over the vocabulary, Shard(0), got {x.placements}"
            )
        return x.to_local()

    # As torch.chunk splits: all parts but the last ones have as many rows.
    each = -(-vocab_size // mesh.size())
    if each * (mesh.size() - 1) >= vocab_size:
        raise ValueError(
            f"weight must have rows on each of {mesh.size()} processes, got {vocab_size} in all"
        )
    local = of_columns("weight", weight)
    return (
        of_tokens("hidden", hidden),
        local,
        None if bias is None else of_columns("bias", bias),
        None if lora is None else (of_tokens("lora[0]", lora[0]), of_columns("lora[1]", lora[1])),
        VocabParallel(mesh.get_group(), mesh.get_local_rank() * each, vocab_size, "none"),
    )
