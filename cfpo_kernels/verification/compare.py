"""Whether results are right: held against float64, with limits that a broken kernel exceeds.

Off the target p is about 1e-5, so an absolute tolerance would pass a kernel that writes zeros. The
target's column and the others are judged apart, the others by the relative error of each row, of
its last columns and of each element: most of a row's norm lies in a few columns, and an average
over them hides a tail that is missing or one element that is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Of float32 arithmetic over the longest rows.
RELATIVE = 1e-5
# Of one element: the approximation of its exponential comes on top.
ELEMENT = 1e-4
# Beside these: what rounding the exact gradient costs, and room for the other side of a tie.
ROUNDING_SLACK = 1.1
TAIL = 8
# Numbers that are subnormal in float32 may be flushed to zero.
SMALLEST = 1e-36
HALF_ULP = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# float16 has no more than this to hold what is subnormal in it.
SUBNORMAL_STEP = {torch.float32: 0.0, torch.bfloat16: 0.0, torch.float16: 2.0**-25}
TARGET_FLOOR = {torch.float32: 1e-12, torch.bfloat16: 1e-12, torch.float16: 6e-8}


@dataclass(frozen=True)
class Exact:
    """What is right for the rows that count; K of them, float64."""

    rows: Tensor  # (K,) int64, which rows of the batch these are
    token_ids: Tensor  # (K,) int64
    loss: Tensor  # (K,)
    logps: Tensor  # (K,)
    entropy: Tensor  # (K,)
    dlogits: Tensor  # (K, V)
    # The least that errors are measured against: near its optimum the coefficient of a row is
    # small, but still changes by so much with the rounding of log p. (K, V), of each column.
    floor: Tensor


def rounding_limit(x: Tensor, dtype: torch.dtype) -> Tensor:
    """How far a float32 product that was rounded to `dtype` may be from the exact one."""
    step = SUBNORMAL_STEP[dtype] * ROUNDING_SLACK + SMALLEST
    return (2.0**-23 + ROUNDING_SLACK * HALF_ULP[dtype]) * x.abs() + step


def _worst(error: Tensor, allowed: Tensor) -> tuple[Tensor, int]:
    """By how much the limit is exceeded, NaN counting as infinitely, and in which row."""
    excess = torch.nan_to_num(error / allowed.clamp_min(1e-300), nan=float("inf"))
    if excess.dim() > 1:
        excess = excess.amax(-1)
    row = int(excess.argmax())
    return excess[row], row


def _judge(what: str, error: Tensor, allowed: Tensor, rows: Tensor) -> Iterator[str]:
    if not error.numel():
        return
    excess, row = _worst(error, allowed)
    if not excess <= 1:
        yield f"{what} in row {int(rows[row])}: {float(excess):.3g} times the allowed error"


def gradient_faults(got: Tensor, exact: Exact) -> list[str]:
    """What is wrong with a gradient (N, V) at the rows of `exact`; empty if nothing is."""
    dtype = got.dtype
    ids, want = exact.token_ids[:, None], exact.dlogits
    got = got[exact.rows].double()
    if not torch.isfinite(got).all():
        bad = ~torch.isfinite(got).all(-1)
        return [f"the gradient of row {int(exact.rows[bad][0])} is not finite"]
    target_got, target_want = got.gather(1, ids), want.gather(1, ids)
    off_got, off_want = got.scatter(1, ids, 0.0), want.scatter(1, ids, 0.0)
    floor = exact.floor.scatter(1, ids, 0.0)
    faults: list[str] = []
    for columns, of, factor in (
        (slice(None), "", 1.0),
        (slice(-TAIL, None), ", last columns,", 4.0),
    ):
        part = off_want[:, columns]
        rounding = (part.to(dtype).double() - part).norm(dim=-1)
        size = torch.maximum(part.norm(dim=-1), floor[:, columns].norm(dim=-1))
        allowed = factor * RELATIVE * size + ROUNDING_SLACK * rounding + SMALLEST
        error = (off_got[:, columns] - part).norm(dim=-1)
        faults += _judge(f"off-target gradient{of}", error, allowed, exact.rows)

    size = torch.maximum(off_want.abs(), floor)
    step = SUBNORMAL_STEP[dtype] * ROUNDING_SLACK + SMALLEST
    allowed = (ELEMENT + ROUNDING_SLACK * HALF_ULP[dtype]) * size + step
    faults += _judge("an off-target element", (off_got - off_want).abs(), allowed, exact.rows)

    # The target's own p is taken out of its floor: what is left of the row is 1 - p.
    size = torch.maximum(target_want.abs(), floor.sum(-1, keepdim=True))
    allowed = (ROUNDING_SLACK * HALF_ULP[dtype] + RELATIVE) * size + TARGET_FLOOR[dtype]
    faults += _judge("target gradient", (target_got - target_want).abs(), allowed, exact.rows)
    return faults


def value_faults(
    exact: Exact, *, loss: Tensor | None, logps: Tensor, entropy: Tensor | None
) -> list[str]:
    """What is wrong with the numbers of each row, (N,) each."""
    faults: list[str] = []
    scale = exact.logps.abs().clamp_min(1.0)
    error = (logps[exact.rows].double() - exact.logps).abs()
    faults += _judge("logp", error, 0.1 * RELATIVE * scale, exact.rows)
    if entropy is not None:
        scale = exact.entropy.abs().clamp_min(1.0)
        error = (entropy[exact.rows].double() - exact.entropy).abs()
        faults += _judge("entropy", error, 0.3 * RELATIVE * scale, exact.rows)
    if loss is not None:
        # Terms of either sign cancel in a loss, whose error is that of the terms.
        scale = exact.loss.abs().max().clamp_min(1.0) if exact.loss.numel() else exact.loss
        error = (loss[exact.rows].double() - exact.loss).abs()
        faults += _judge("loss", error, (RELATIVE * scale).expand_as(error), exact.rows)
    return faults


def zero_faults(dlogits: Tensor, masked: Tensor) -> list[str]:
    """Rows that do not count have gradients that are bitwise zero."""
    rows = dlogits[masked]
    bits = rows.contiguous().view(torch.int32 if rows.dtype == torch.float32 else torch.int16)
    return ["a masked row's gradient is not bitwise zero"] if bool(bits.any()) else []


def same_bits(what: str, first: Tensor, second: Tensor) -> list[str]:
    """NaN equals itself here."""
    as_bytes = [x.detach().contiguous().view(torch.uint8) for x in (first, second)]
    return [] if torch.equal(*as_bytes) else [f"{what}: other bits"]


def planted_faults(dlogits: Tensor, exact: Exact) -> Iterator[tuple[str, Tensor]]:
    """Right gradients, each damaged in a way that `gradient_faults` has to see."""
    rows, ids = exact.rows, exact.token_ids
    n_cols = dlogits.shape[1]

    def damaged() -> Tensor:
        return dlogits.clone()

    zeros = damaged()
    zeros[rows] = torch.zeros_like(zeros[rows]).scatter(
        1, ids[:, None], zeros[rows].gather(1, ids[:, None])
    )
    yield "zeros off target", zeros
    tail = damaged()
    tail[rows, -3:] = 0
    yield "the last three columns missing", tail
    largest = exact.dlogits.abs().scatter(1, ids[:, None], 0.0).sum(-1).argmax()
    row, middle = rows[largest], n_cols // 2
    column = torch.where(ids[largest] == middle, middle - 1, middle)
    one = damaged()
    one[row, column] = one[row, column] * 1.25 + 1e-30
    yield "one element a quarter too large", one
    target = damaged()
    target[row, ids[largest]] *= 1.05
    yield "the target's column 5% too large", target
    yield (
        "the gradients of two rows exchanged",
        torch.cat([damaged()[: rows[0]], damaged()[rows[0] :].roll(1, 0)]),
    )
