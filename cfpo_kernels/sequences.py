"""Numbers of whole sequences, padded or packed, in float64 and plain torch.

For objectives that look beyond one token (GSPO, GMPO, VESPO, MinPRO), for preference losses, and
for advantages of groups. Nothing here forces a device to synchronise, and the numbers of a sequence
have the same bits whatever it is padded to and whichever others are in the batch.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import api, weights
from .validation import scalars, tensors
from .validation.errors import type_error
from .validation.sequences import Sequences, check_sequences

SCALES = ("std", "none")


def _given(name: str, values: object, mask: object, cu_seqlens: object) -> tuple[Tensor, Sequences]:
    """The values as (N,), 0 where masked, so that neither these nor their gradient matter."""
    source = tensors.floats(name, values)
    batch = check_sequences(name, source, mask, cu_seqlens)
    return torch.where(batch.active, source.reshape(-1), 0.0), batch


def _totals(values: Tensor, batch: Sequences) -> Tensor:
    n_sequences = batch.shape.numel()
    totals = weights.sequence_totals(values.double(), batch.index, n_sequences, batch.longest)
    return totals.reshape(batch.shape)


def sequence_sum(
    values: Tensor, mask: Tensor | None = None, *, cu_seqlens: Tensor | None = None
) -> Tensor:
    """The sum of each sequence's numbers, in float64.

    Args:
        values: (..., T) floating point, or packed (N,) with cu_seqlens; differentiable.
        mask: the shape of values, bool or number; where it is 0 the value is not looked at, and may
            be NaN.
        cu_seqlens: (B + 1,) int, bounds of the sequences in packed values.

    Returns:
        (...), or (B,) where packed, float64 whatever dtype came: a difference of two such sums
        keeps its digits. 0 for a sequence without unmasked tokens.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, device or value.

    Memory: O(N), float64 inside, and for a gradient a byte a token for each of log2(T) steps, or
    log2(N) where packed. Differentiable twice.

    Example:
        >>> log_ratio = torch.tensor([[0.1, 0.2, 0.3], [0.5, torch.nan, torch.nan]])
        >>> sequence_sum(log_ratio, torch.tensor([[1, 1, 1], [1, 0, 0]])).tolist()
        [0.6000000163912773, 0.5]
    """
    return _totals(*_given("values", values, mask, cu_seqlens))


def sequence_mean(
    values: Tensor, mask: Tensor | None = None, *, cu_seqlens: Tensor | None = None
) -> Tensor:
    """The mean of each sequence's unmasked numbers, in float64.

    ``exp(sequence_mean(logps - old_logps, mask))`` is the ratio of GSPO, arXiv 2507.18071.

    Args, raises, memory: see :func:`sequence_sum`.

    Returns:
        (...), or (B,) where packed, float64. 0 for a sequence without unmasked tokens.

    Example:
        >>> values = torch.tensor([1.0, 3.0, 5.0, 7.0])
        >>> sequence_mean(values, cu_seqlens=torch.tensor([0, 3, 3, 4])).tolist()
        [3.0, 0.0, 7.0]
    """
    given, batch = _given("values", values, mask, cu_seqlens)
    counts = _totals(batch.active, batch)
    return _totals(given, batch) / counts.clamp(min=1)


def suffix_sum(
    values: Tensor, mask: Tensor | None = None, *, cu_seqlens: Tensor | None = None
) -> Tensor:
    """For each token the sum over it and the unmasked tokens after it in its sequence.

    Args, raises, memory: see :func:`sequence_sum`.

    Returns:
        The shape of values, float64; 0 where masked.

    Example:
        >>> suffix_sum(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[1, 0, 1]])).tolist()
        [[5.0, 0.0, 4.0]]
    """
    given, batch = _given("values", values, mask, cu_seqlens)
    sums = weights.suffix_sums(given.double(), batch.index, batch.longest)
    return torch.where(batch.active, sums, 0.0).reshape(values.shape)


def prefix_min(
    values: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    exclusive: bool = False,
    empty: float = math.inf,
) -> Tensor:
    """For each token the least number of it and the unmasked tokens before it in its sequence.

    With log ratios, ``exclusive=True`` and ``empty=0.0``, ``exp(log_ratio + prefix_min(...))`` is
    MinPRO's weight ``r_t min_{i<t} r_i``, arXiv 2601.22718.

    Args:
        exclusive: only the tokens before it.
        empty: number; what stands for the least of no tokens at all, where exclusive.
        others: see :func:`sequence_sum`.

    Returns:
        The shape of values, float32 or, for float64 values, float64; 0 where masked. A gradient
        goes to the first of the tokens that have the least number. A NaN is less than any number:
        it reaches the tokens after it in its sequence, and no others.

    Raises: see :func:`sequence_sum`.

    Memory: O(N), for a sort.

    Example:
        >>> prefix_min(torch.tensor([[3.0, 1.0, 2.0]]), exclusive=True, empty=0.0).tolist()
        [[0.0, 3.0, 1.0]]
    """
    scalars.check_flag("exclusive", exclusive)
    least = scalars.plain_number("empty", empty, "a number", lambda x: True)
    given, batch = _given("values", values, mask, cu_seqlens)
    given, index, n = given.to(tensors.result_dtype(values)), batch.index, given.shape[0]
    # One cumulative minimum over all sequences, of ranks: those of a later sequence are all below
    # those of an earlier one, so that it starts anew. Masked tokens come last, NaN first.
    order = torch.argsort(given.detach(), stable=True)
    positions = torch.arange(n, dtype=torch.int64, device=order.device)
    rank = torch.empty_like(order).scatter_(0, order, positions)
    rank = torch.where(given.isnan(), -1, rank)
    rank = torch.where(batch.active, rank, n)
    lowest, where = torch.cummin(rank - index * (n + 2), 0)
    none = lowest + index * (n + 2) == n
    found = torch.where(none, least, given[where])
    if exclusive:
        found = torch.cat([torch.full_like(found[:1], least), found[:-1]])
        found = torch.where(batch.starts() == positions, least, found)
    return torch.where(batch.active, found, 0.0).reshape(values.shape)


def order_free_sum(values: Tensor, *, group: Any = None) -> Tensor:
    """The sum of all numbers of all processes, in bits that no order or split of them changes.

    A loss is a sum over sequences. Of their totals, such as :func:`sequence_sum`'s, this makes the
    same loss on 1, 2 and 4 data-parallel processes.

    Args:
        values: any shape, float.
        group: the process group whose numbers are summed; None: this process's alone.

    Returns:
        0-d float64, the same on all processes; differentiable in this process's values. Exact to
        2^-120 of the largest number, before it is rounded.

    Raises:
        TypeError: values are no floating-point tensor.

    Memory: O(N); with a group two small all-reduces.

    Example:
        >>> values = torch.tensor([1e20, 1.0, -1e20])
        >>> order_free_sum(values).item(), values.sum().item()
        (1.0, 0.0)
    """
    given = tensors.floats("values", values).double().reshape(-1)
    x = given.detach()
    finite = x.isfinite()
    lost = torch.where(finite, 0.0, x).sum()
    x = torch.where(finite, x, 0.0)
    largest = torch.frexp(torch.cat([x, x.new_zeros(1)]).abs().amax()).exponent.to(torch.int64)
    _reduce(largest, "MAX", group)
    rest = torch.ldexp(x, -largest)
    digits = []
    for _ in range(4):
        rest = rest * 2.0**30
        whole = rest.trunc()
        digits.append(whole.to(torch.int64).sum())
        rest = rest - whole
    total = torch.stack(digits)
    _reduce(total, "SUM", group)
    _reduce(lost, "SUM", group)
    carried = list(total.unbind())
    for i in (3, 2, 1):  # so that each but the first is a digit, and the sum rounds once
        carry = torch.div(carried[i], 2**30, rounding_mode="floor")
        carried[i] -= carry * 2**30
        carried[i - 1] = carried[i - 1] + carry
    low = (carried[2] * 2**30 + carried[3]).double() * 2.0**-60
    found = (carried[0].double() + (carried[1].double() + low) * 2.0**-30) * 2.0**-30
    found = torch.ldexp(found, largest) + lost
    return found + (given.sum() - given.sum().detach()) if given.requires_grad else found


def _reduce(x: Tensor, operation: str, group: Any) -> None:
    if group is not None:
        op = getattr(torch.distributed.ReduceOp, operation)
        torch.distributed.all_reduce(x, op=op, group=group)


def sequence_logps(
    logits: Tensor,
    token_ids: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    inplace: bool = False,
    backend: str = "auto",
) -> Tensor:
    """log p of each response: the float64 sum of its :func:`cfpo_kernels.token_logps`.

    Args:
        logits: (B, T, V), or packed (N, V) with cu_seqlens; see :func:`cfpo_kernels.cfpo_loss`.
        token_ids, mask, temperature, inplace, backend: see :func:`cfpo_kernels.token_logps`.
        cu_seqlens: (B + 1,) int, bounds of the sequences in packed logits.

    Returns:
        (B,) float64, in nats; differentiable. 0 for a sequence without unmasked tokens.

    Raises, memory: see :func:`cfpo_kernels.token_logps`.

    Example:
        >>> logits = torch.zeros(2, 3, 4)
        >>> token_ids = torch.tensor([[1, 2, 3], [3, -100, -100]])
        >>> (sequence_logps(logits, token_ids, token_ids != -100) / math.log(4)).round(decimals=6)
        tensor([-3., -1.], dtype=torch.float64)
    """
    logps = api.token_logps(
        logits, token_ids, mask=mask, temperature=temperature, inplace=inplace, backend=backend
    )
    assert isinstance(logps, Tensor)
    batch = check_sequences("logits", logits, mask, cu_seqlens)
    return _totals(logps.reshape(-1), batch)


def group_advantages(
    rewards: Tensor,
    group_ids: Tensor | None = None,
    group_size: int | None = None,
    *,
    scale: str = "std",
    min_std: float | Tensor = 1e-6,
) -> Tensor:
    """Advantages of responses to one prompt: ``(R - mean) / max(std, min_std)`` of their group.

    Args:
        rewards: any shape, a real number for each response. One that is not finite makes its
            group NaN and no other.
        group_ids: the shape of rewards, int64 or int32, equal for the responses of a group; any
            values in any order.
        group_size: instead of group_ids, where each group is that many responses in a row.
        scale: "std" as in GRPO, or "none" as in Dr. GRPO, where the mean is only subtracted.
        min_std: number or 0-d tensor, 0 or more; the least that is divided by. TRL and verl add a
            small number to the standard deviation instead.

    Returns:
        The shape of rewards, float32 or, for float64 rewards, float64; detached. Rewards that equal
        their group's give exactly 0, and so does a group of one. The standard deviation is that
        of a sample, over n - 1, as in the trainers.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape, device or value.

    Memory: O(N), float64 inside.

    Source: GRPO, arXiv 2402.03300, section 4.1.2; Dr. GRPO, arXiv 2503.20783.

    Example:
        >>> rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 1000.1, 1000.1])
        >>> ids = torch.tensor([7, 7, 3, 3, 9, 9])
        >>> group_advantages(rewards, ids).tolist()
        [0.7071067690849304, -0.7071067690849304, -0.7071067690849304, 0.7071067690849304, 0.0, 0.0]
    """
    accepted = "a tensor of real numbers"
    if not isinstance(rewards, Tensor) or rewards.is_complex():
        raise type_error("rewards", rewards, accepted)
    scalars.check_choice("scale", scale, SCALES)
    floor = scalars.number(
        "min_std", min_std, "a finite number, 0 or more", lambda x: 0 <= x < math.inf
    )
    with torch.no_grad():
        given, dtype = rewards.reshape(-1).double(), tensors.result_dtype(rewards)
        order, index, longest = _groups(rewards, group_ids, group_size)
        given = given[order]
        starts = torch.searchsorted(index, index)
        counts = torch.searchsorted(index, index, right=True) - starts
        # Without the first of them equal rewards are exactly 0, and so is their mean.
        given = given - given[starts]
        given = given - weights.suffix_sums(given, index, longest)[starts] / counts
        if scale == "std":
            variance = weights.suffix_sums(given**2, index, longest)[starts] / (counts - 1)
            least = scalars.on_device(floor, given.device)
            given = torch.where(given == 0, 0.0, given / torch.maximum(variance.sqrt(), least))
        return torch.empty_like(given).scatter_(0, order, given).to(dtype).reshape(rewards.shape)


def _groups(rewards: Tensor, ids: object, size: object) -> tuple[Tensor, Tensor, int]:
    """An order (N,) that brings groups together, the group of each in it, and the longest's size"""
    n, device = rewards.numel(), rewards.device
    if (ids is None) == (size is None):
        raise ValueError(
            "either group_ids or group_size must be given, got "
            + ("neither" if ids is None else "both")
        )
    if size is not None:
        size = scalars.whole_number("group_size", size)
        if size < 1 or n % size != 0:
            raise ValueError(f"group_size must divide the {n} rewards, got {size}")
        order = torch.arange(n, dtype=torch.int64, device=device)
        return order, torch.div(order, size, rounding_mode="floor"), size
    accepted = "an int64 or int32 tensor (for groups of one size: group_size=)"
    given = tensors.check_tensor("group_ids", ids, rewards, accepted, "rewards")
    if given.dtype not in (torch.int64, torch.int32):
        raise type_error("group_ids", given, accepted)
    if given.shape != rewards.shape:
        raise ValueError(
            f"group_ids must have the shape of rewards, {tuple(rewards.shape)}, "
            f"got {tuple(given.shape)}"
        )
    found, order = torch.sort(given.reshape(-1), stable=True)
    new = torch.ones_like(found)
    new[1:] = (found[1:] != found[:-1]).to(new.dtype)
    return order, new.to(torch.int64).cumsum(0) - 1, n
