"""A vocabulary that is split over the processes of a group, each with some of the head's rows."""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import backends
from .autograd import refuse_create_graph, save, saved
from .backends.base import KernelRows
from .lse import merge
from .tiles import Scores, Tiles
from .validation import LossTerms, Rows, values
from .validation.errors import type_error
from .validation.scalars import positive_int, whole_number
from .verification import choice

REDUCTIONS = ("all_reduce", "reduce_scatter", "none")


@dataclass(frozen=True)
class VocabParallel:
    """How the vocabulary is split over a process group.

    Make it once: the first call with it asks the other processes for their parts, and waits for
    the device. Where all have as many rows, `even` needs no question, at any call.

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
        TypeError, ValueError: an argument has a wrong type or value; at the first call, where the
            processes' columns are not the vocabulary, each of them once.

    Example:
        >>> def loss_of(hidden, weight, group, rank):  # weight: rows rank * 512 to rank * 512 + 511
        ...     where = cfpo_kernels.VocabParallel(group, start=rank * 512, vocab_size=1024)
        ...     return cfpo_kernels.linear_cfpo_loss(
        ...         hidden, weight, token_ids, advantages, old_logps, vocab_parallel=where
        ...     )
    """

    group: Any
    start: int
    vocab_size: int
    reduce_hidden_grad: str = "all_reduce"
    # Not by value: another process's part may differ where this one's is the same.
    known: dict[int, Shards] = field(default_factory=dict, init=False, repr=False, compare=False)
    # Of each process, by `even`: what the others have is then known without asking.
    rows: int | None = field(default=None, init=False, repr=False)

    @classmethod
    def even(
        cls, group: Any, n_rows: int, vocab_size: int, reduce_hidden_grad: str = "all_reduce"
    ) -> VocabParallel:
        """Each process has `n_rows` rows of the head, in the order of its ranks, as Megatron's.

        Nothing is asked of the others, so that it costs nothing to make one in each call. That all
        have as many rows is the caller's word: with CFPO_KERNELS_DEBUG=1 they are asked.

        Args:
            n_rows: of each process's weight, padding included.
            group, vocab_size, reduce_hidden_grad: see above.
        """
        n_rows = positive_int("n_rows", n_rows)
        found = cls(group, group.rank() * n_rows, vocab_size, reduce_hidden_grad)
        object.__setattr__(found, "rows", n_rows)
        return found

    def kept(self, n_cols: int) -> int:
        """Columns of the vocabulary, of so many with padding."""
        return max(0, min(n_cols, self.vocab_size - self.start))

    def __post_init__(self) -> None:
        for name in ("start", "vocab_size"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name)))
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


# Where all shards begin on a multiple of this, rows have the bits of any other such split.
BLOCK = 1024


@dataclass(frozen=True)
class Shards:
    """This process's columns [start, start + n_cols) of a vocabulary of `vocab_size`.

    Attributes:
        block: columns of a block; blocks are summed one by one and merged in order.
        counts: how many blocks each rank has.
        order: the ranks, in the order of their columns.
    """

    group: Any
    start: int
    n_cols: int
    vocab_size: int
    block: int
    counts: tuple[int, ...]
    order: tuple[int, ...]

    @staticmethod
    def of(given: object, n_cols: int, device: torch.device) -> Shards:
        """Of a VocabParallel, and as many columns as this process has with padding.

        All processes of the group have to call this: they tell each other their columns, unless
        these are even.
        """
        if not isinstance(given, VocabParallel):
            raise type_error("vocab_parallel", given, "a VocabParallel")
        kept, rows = given.kept(n_cols), given.rows
        if rows is not None and kept != given.kept(rows):
            raise ValueError(
                f"VocabParallel.even was told n_rows={rows} of each process, got {n_cols} columns"
            )
        if kept not in given.known:
            if rows is None or values.is_debugging():
                ranges = _ranges(given.group, given.start, kept, device)
            else:
                starts = (rank * rows for rank in range(given.group.size()))
                ranges = [(s, max(0, min(rows, given.vocab_size - s))) for s in starts]
            given.known[kept] = Shards._from_ranges(given, kept, ranges)
        return given.known[kept]

    @staticmethod
    def _from_ranges(given: VocabParallel, kept: int, ranges: list[tuple[int, int]]) -> Shards:
        end = 0
        for start, size in sorted(ranges):
            if start != end or size == 0:
                end = -1
                break
            end += size
        if end != given.vocab_size:
            described = ", ".join(f"[{start}, {start + size})" for start, size in ranges)
            raise ValueError(
                "vocab_parallel: the columns of all processes must be the vocabulary, each of them "
                f"once, and some on each process; got {described} of vocab_size={given.vocab_size}"
            )
        aligned = all(start % BLOCK == 0 for start, _ in ranges)
        block = BLOCK if aligned else max(size for _, size in ranges)
        counts = tuple(-(-size // block) for _, size in ranges)
        order = tuple(sorted(range(len(ranges)), key=lambda rank: ranges[rank]))
        return Shards(given.group, given.start, kept, given.vocab_size, block, counts, order)

    def agree(self, name: str, resolved: str, device: torch.device, dtype: torch.dtype) -> str:
        """The kernels that all processes run: those that `resolved` is everywhere, else some that
        each of them has. Each asks the others at the first call of a kind.

        name: what a caller asked for, "auto" or a backend.
        """
        agreed = _agreed.setdefault(self.group, {})
        kind = (name, device.type, dtype, self.vocab_size)
        if kind not in agreed:
            found = choice.alternatives(device, dtype) if name == "auto" else set()
            agreed[kind] = _in_common(self.group, resolved, found, device)
        return agreed[kind]

    def refuse_differences(self, rows: Rows, terms: LossTerms | None = None) -> None:
        """With CFPO_KERNELS_DEBUG, compares what has to be the same on all processes."""
        if not values.is_debugging():
            return
        named: dict[str, Tensor | None] = {
            "mask": rows.active,
            "token_ids": rows.token_ids,
            "temperature": rows.temperature,
        }
        numbers = ""
        if terms is not None:
            names = {"low": "log_ratio_bounds[0]", "high": "log_ratio_bounds[1]"}
            named |= {names.get(k, k): x for k, x in terms.inputs._asdict().items()}
            named |= {"reduction or normalizer": terms.weights, "grad_scale": terms.grad_scale}
            numbers = repr(terms.settings)
        sums = [_checksum(x, rows.active) for x in named.values()]
        check = zlib.crc32(numbers.encode())
        sums.append(torch.tensor(check, dtype=torch.int64, device=rows.active.device))
        everyone = _gathered(self.group, torch.stack(sums))
        wrong = [
            f"{name} on ranks {', '.join(str(i) for i in others)}"
            for k, name in enumerate([*named, "the objective or a coefficient"])
            if (others := [i for i, its in enumerate(everyone) if its[k] != everyone[0][k]])
        ]
        if wrong:
            raise ValueError(
                "vocab_parallel needs the same tokens and numbers on all processes of the group; "
                f"not those of rank 0 are {'; '.join(wrong)}"
            )

    def score(self, tiles: Tiles, rows: KernelRows, with_entropy: bool) -> Callable[[], Scores]:
        """Stage 1 of this shard's (n, n_cols) logits, sent to the others; what it returns waits for
        theirs and merges all, in the order of the vocabulary, so that all processes have the same
        bits.
        """
        active = rows.weights != 0
        temperature = torch.where(active, rows.temperature, 1.0).double()
        here = (rows.token_ids >= 0) & (rows.token_ids < self.n_cols)
        ids = rows.token_ids + self.start
        # The block that the token is in, of all ranks'.
        place = self.order.index(self.group.rank())
        first = sum(self.counts[rank] for rank in self.order[:place])
        at = torch.where(here, first + rows.token_ids // self.block, -1).double()
        logps, lse, entropy = self._of_blocks(tiles, rows, with_entropy)
        mine = torch.cat([*lse.unbind(-1), entropy, logps.amax(0, keepdim=True), at[None]])
        everyone = [torch.empty_like(mine) for _ in self.counts]
        work = torch.distributed.all_gather(everyone, mine, group=self.group, async_op=True)

        def merged() -> Scores:
            work.wait()
            most = max(self.counts)
            found = torch.stack(everyone)
            # A rank brings as many blocks as the one that has most.
            of_ranks = found[:, :-2].unflatten(1, (-1, most))
            in_order = [of_ranks[rank][:, : self.counts[rank]] for rank in self.order]
            anchors, above, *entropies = torch.cat(in_order, 1)
            whole = merge(torch.stack([anchors, above], -1), temperature)
            of_token, at = found[:, -2:].amax(0)
            gap = whole.gaps.gather(0, at.long().clamp(min=0)[None]).squeeze(0)
            known = (ids >= 0) & (ids < self.vocab_size)
            logps = torch.where(active, torch.where(known, of_token - gap, torch.nan), 0.0)
            entropy = None
            if with_entropy:
                entropy = torch.where(active, whole.entropy(entropies[0]), 0.0)
                entropy = entropy.to(rows.weights.dtype)
            return Scores(logps, torch.where(active[:, None], whole.lse, 0.0), entropy)

        return merged

    def _of_blocks(
        self, tiles: Tiles, rows: KernelRows, with_entropy: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """log p (blocks, n), lse (blocks, n, 2) and, if asked for, entropy (blocks, n), float64; of
        nothing where another rank has a block more.
        """
        n_rows, most = rows.logits.shape[0], max(self.counts)
        temperature = rows.temperature
        like = rows.logits.new_empty(0, dtype=torch.float64)
        logps = like.new_full((most, n_rows), -torch.inf)
        lse = like.new_full((most, n_rows, 2), -torch.inf)
        entropy = like.new_zeros(most if with_entropy else 0, n_rows)
        whole = self.n_cols // self.block
        for first, count, size in (
            (0, whole, self.block),
            (whole, 1, self.n_cols - whole * self.block),
        ):
            if count == 0 or size == 0:
                continue
            columns = slice(first * self.block, first * self.block + count * size)
            logits = rows.logits[:, columns].unflatten(1, (count, size))
            begins = torch.arange(
                columns.start, columns.stop, size, dtype=torch.int64, device=logits.device
            )

            def of_block(x: Tensor, count: int = count) -> Tensor:
                return x[:, None].expand(-1, count).reshape(-1).contiguous()

            found = tiles.score(
                rows._replace(
                    logits=logits,
                    token_ids=(rows.token_ids[:, None] - begins).reshape(-1),
                    weights=of_block(rows.weights),
                    temperature=temperature if temperature.numel() == 1 else of_block(temperature),
                ),
                with_entropy,
            )
            blocks = slice(first, first + count)
            logps[blocks] = found.logps.reshape(n_rows, count).t()
            lse[blocks] = found.lse.reshape(n_rows, count, 2).transpose(0, 1)
            if found.entropy is not None:
                entropy[blocks] = found.entropy.reshape(n_rows, count).t()
        return logps, lse, entropy


# By group, and by what a call is.
_agreed: weakref.WeakKeyDictionary[Any, dict[tuple[Any, ...], str]] = weakref.WeakKeyDictionary()


def _in_common(group: Any, mine: str, others: set[str], device: torch.device) -> str:
    names = (*backends.KERNELS, backends.REFERENCE)
    flags = [2 if name == mine else int(name in others) for name in names]
    everyone = _gathered(group, torch.tensor(flags, dtype=torch.int64, device=device))
    chosen = [names[its.index(2)] for its in everyone]
    if len(set(chosen)) == 1:
        return mine
    described = ", ".join(f"{name} on rank {i}" for i, name in enumerate(chosen))
    common = [
        name
        for name, of_ranks in zip(names, zip(*everyone, strict=True), strict=True)
        if all(of_ranks)
    ]
    if not common:
        raise ValueError(
            "backend must be the same on all processes of vocab_parallel's group, or 'auto', got "
            f"{described}"
        )
    agreed = max(common, key=chosen.count)  # the first of those that most have chosen
    choice.warn(
        f"the processes of a VocabParallel group would run {described}; all run {agreed}, for the "
        "bits of their losses have to be the same"
    )
    return agreed


def _checksum(x: Tensor | None, active: Tensor) -> Tensor:
    """0-d int64: of numbers and their places, where they count."""
    if x is None:
        return torch.zeros((), dtype=torch.int64, device=active.device)
    if x.numel() == active.numel():
        x = torch.where(active, x.reshape(-1), torch.zeros_like(x.reshape(-1)))
    bits = x.reshape(-1).double().view(torch.int64)
    places = torch.arange(1, 2 * bits.numel() + 1, 2, dtype=torch.int64, device=bits.device)
    return (bits * places).sum() + bits.numel() + 1


def _gathered(group: Any, mine: Tensor) -> list[list[int]]:
    """A few integers of each rank."""
    everyone = [torch.empty_like(mine) for _ in range(group.size())]
    torch.distributed.all_gather(everyone, mine, group=group)
    return [x.tolist() for x in everyone]


def _ranges(group: Any, start: int, n_cols: int, device: torch.device) -> list[tuple[int, int]]:
    """The first column and the number of columns of each rank."""
    everyone = _gathered(group, torch.tensor([start, n_cols], dtype=torch.int64, device=device))
    return [(first, count) for first, count in everyone]


class ShardedLogpsFunction(torch.autograd.Function):
    """As ``autograd.TokenLogpsFunction``, for one shard of the logits."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        inplace: bool,
        rounded: bool,
        token_ids: Tensor,
        weights: Tensor,
        temperature: Tensor,
        with_entropy: bool,
        tiles: Tiles,
        shards: Shards,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = KernelRows(logits.detach(), token_ids, weights, temperature, sharded=True)
        logps, lse, entropy = shards.score(tiles, rows, with_entropy)()
        entropy = weights.new_empty(0) if entropy is None else entropy
        save(ctx, logits, *rows.tensors()[1:], logps, lse, entropy)
        ctx.inplace, ctx.tiles = inplace, tiles
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return logps.to(weights.dtype) if rounded else logps, entropy, lse

    @staticmethod
    def backward(
        ctx: Any, dlogps: Tensor | None, dentropy: Tensor | None, _: Any
    ) -> tuple[Tensor | None, ...]:
        dentropy = None if dentropy is None or dentropy.numel() == 0 else dentropy
        if dlogps is None and dentropy is None:
            return (None,) * 9
        refuse_create_graph()
        logits, token_ids, weights, temperature, logps, lse, entropy = saved(ctx)
        dlogps = torch.zeros_like(logps) if dlogps is None else dlogps
        dlogps = dlogps.to(weights.dtype).contiguous()
        dlogits = logits.detach() if ctx.inplace else logits.detach().clone()
        ctx.tiles.gradient_(
            KernelRows(dlogits, token_ids, weights, temperature, sharded=True),
            Scores(logps, lse, None if dentropy is None else entropy),
            dlogps,
            None if dentropy is None else dentropy.contiguous(),
        )
        if ctx.inplace:
            torch.autograd.graph.increment_version(logits)
        return dlogits, *(None,) * 8


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
    given = VocabParallel.even(mesh.get_group(), each, vocab_size, "none")
    return (
        of_tokens("hidden", hidden),
        local,
        None if bias is None else of_columns("bias", bias),
        None if lora is None else (of_tokens("lora[0]", lora[0]), of_columns("lora[1]", lora[1])),
        given,
    )
