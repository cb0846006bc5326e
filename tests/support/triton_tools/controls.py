"""Kernels that are right, and kernels that are wrong in one known way, to try the tools on."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .offline import fake


@triton.jit
def identity(x):
    return x


@triton.jit
def double(x):
    return x * 2.0


@triton.jit
def copy_rows(
    x_ptr,  # (N, V), rows stride_x apart
    y_ptr,  # (N, V), rows stride_y apart
    stride_x,
    stride_y,
    n_cols,
    BLOCK: tl.constexpr,
    BUG: tl.constexpr = "none",
    FUNCTION: tl.constexpr = identity,
):
    """One program a row: y = FUNCTION(x)."""
    row = tl.program_id(0).to(tl.int64)
    begin, end = 0, n_cols
    x_row, y_row = x_ptr + row * stride_x, y_ptr + row * stride_y
    if BUG == "begins late":
        begin = 1
    if BUG == "ends late":
        end = n_cols + 1
    if BUG == "ends early":
        end = n_cols - 1
    if BUG == "shares rows":
        y_row = y_ptr + row // 2 * stride_y
    if BUG == "reads the next row":
        x_row = x_ptr + (row + 1) % tl.num_programs(0) * stride_x
    if BUG == "int32 product":
        y_row = y_ptr + tl.program_id(0) * stride_y
    if BUG == "int32 offset":
        y_row = y_ptr + (row * stride_y).to(tl.int32)
    if BUG == "other width":
        y_row = y_row.to(tl.pointer_type(tl.float16))
    if BUG == "wild pointer":
        y_row = (row + 64).to(y_ptr.dtype)
    for start in range(0, n_cols, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        mask = (cols >= begin) & (cols < end)
        x = FUNCTION(tl.load(x_row + cols, mask=cols < n_cols, other=0.0).to(tl.float32))
        if BUG == "repeats lanes":
            cols = cols // 2
        if BUG == "odd address":
            y_row = (y_row.to(tl.int64) + 1).to(y_ptr.dtype)
        tl.store(y_row + cols, x.to(y_row.dtype.element_ty), mask=mask)
        if BUG == "stores twice":
            tl.store(y_row + cols, x.to(y_row.dtype.element_ty), mask=mask)


def launch_copy_rows(
    x: torch.Tensor, y: torch.Tensor, *, bug: str = "none", block: int = 1024, **options: object
) -> None:
    n, v = x.shape
    grid = lambda meta: (triton.cdiv(n, 1),)  # noqa: E731, a callable grid as launchers have them
    copy_rows[grid](x, y, x.stride(0), y.stride(0), v, BLOCK=block, BUG=bug, **options)


@triton.jit
def zero_row(y_ptr, n_cols: tl.constexpr, BLOCK: tl.constexpr):
    """Compiled anew for each n_cols."""
    for start in range(0, n_cols, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        tl.store(y_ptr + cols, tl.zeros([BLOCK], tl.float32), mask=cols < n_cols)


@triton.jit
def centre(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """Needs all of x twice, so it has to hold it."""
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    tl.store(y_ptr + offsets, x - tl.sum(x, 0) / BLOCK)


@triton.heuristics({"BLOCK": lambda args: triton.next_power_of_2(args["n"])})
@triton.jit
def add_optional(pointers, bias_ptr, n, BLOCK: tl.constexpr):
    """pointers[1] = pointers[0] + bias, where there is one."""
    offsets = tl.arange(0, BLOCK)
    x = tl.load(pointers[0] + offsets, mask=offsets < n)
    if bias_ptr is not None:
        x += tl.load(bias_ptr)
    tl.store(pointers[1] + offsets, x, mask=offsets < n)


@triton.jit
def sum_table(x_ptr, y_ptr, n_rows, n_cols, BLOCK: tl.constexpr):
    """A loop in a loop: y = sum of x, (n_rows, n_cols)."""
    total = tl.zeros([BLOCK], tl.float32)
    for row in range(n_rows):
        for start in range(0, n_cols, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            total += tl.load(x_ptr + row * n_cols + cols, mask=cols < n_cols, other=0.0)
        tl.store(y_ptr + row, tl.sum(total, 0))


@triton.jit
def count_programs(counter_ptr, seen_ptr, LOOK: tl.constexpr):
    tl.atomic_add(counter_ptr, 1)
    if LOOK:
        tl.store(seen_ptr + tl.program_id(0), tl.load(counter_ptr))


def launch_examples() -> None:
    """For the command line of `offline`."""
    x = fake((4, 4096), torch.bfloat16)
    launch_copy_rows(x, x)
    add_optional[(1,)]((x, x), None, 4096)


@triton.jit
def merge_softmax(m, s, other_m, other_s):
    top = tl.maximum(m, other_m)
    return top, s * tl.exp2(m - top) + other_s * tl.exp2(other_m - top)


@triton.jit
def apply(x_ptr, y_ptr, z_ptr, out_ptr, n, OP: tl.constexpr, BLOCK: tl.constexpr):
    """out = OP(x, y, z), (n,)."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(x_ptr + offsets, mask=mask, other=0)
    y = tl.load(y_ptr + offsets, mask=mask, other=0)
    z = tl.load(z_ptr + offsets, mask=mask, other=0)
    if OP == "convert":
        out = x
    elif OP == "convert rtne":
        out = x.to(out_ptr.dtype.element_ty, fp_downcast_rounding="rtne")
    elif OP == "convert rtz":
        out = x.to(out_ptr.dtype.element_ty, fp_downcast_rounding="rtz")
    elif OP == "add":
        out = x + y
    elif OP == "subtract":
        out = x - y
    elif OP == "multiply":
        out = x * y
    elif OP == "divide":
        out = x / y
    elif OP == "negate":
        out = -x
    elif OP == "less":
        out = x < y
    elif OP == "equal":
        out = x == y
    elif OP == "abs":
        out = tl.abs(x)
    elif OP == "floor":
        out = tl.floor(x)
    elif OP == "sqrt":
        out = tl.sqrt(x)
    elif OP == "maximum":
        out = tl.maximum(x, y)
    elif OP == "minimum":
        out = tl.minimum(x, y)
    elif OP == "maximum with nan":
        out = tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)
    elif OP == "clamp":
        out = tl.clamp(x, -1.0, 2.0)
    elif OP == "where":
        out = tl.where(offsets % 2 == 0, x, y)
    elif OP == "fma":
        out = tl.fma(x, y, z)
    elif OP == "exp":
        out = tl.exp(x)
    elif OP == "exp2":
        out = tl.exp2(x)
    elif OP == "log":
        out = tl.log(x)
    elif OP == "log2":
        out = tl.log2(x)
    elif OP == "sum":
        out = tl.zeros([BLOCK], tl.float32) + tl.sum(x, 0).to(tl.float32)
    elif OP == "max":
        out = tl.zeros_like(x) + tl.max(x, 0)
    elif OP == "argmax":
        out = tl.zeros_like(x) + tl.argmax(x, 0)
    elif OP == "cumsum":
        out = tl.cumsum(x, 0)
    elif OP == "log-sum-exp2":
        m, s = tl.reduce((x, tl.full([BLOCK], 1.0, tl.float32)), 0, merge_softmax)
        out = tl.zeros_like(x) + m + tl.log2(s)
    elif OP == "and or not":
        out = tl.where((x < 1.0 and not y < 1.0) or x > 2.0, 1.0, 0.0)
    elif OP == "python min":
        out = min(x, y)
    elif OP == "if block":
        out = x
        if x > 0.0:
            out = y
    elif OP == "no other":
        out = tl.load(x_ptr + offsets, mask=offsets < 2)
    elif OP == "scalar other":
        out = tl.zeros_like(x) + tl.load(x_ptr, mask=n < 0, other=0.0)
    tl.store(out_ptr + offsets, out, mask=mask)


@triton.jit
def chain(out_ptr, n):
    tl.store(out_ptr, 0 < n < 5)


@triton.jit
def argument_types(out_ptr, number, large, flag, n):
    """out[0] = number**2, out[1] = large**2, out[2] = flag, out[3 + i] = i * 2**30."""
    tl.store(out_ptr, (number * number).to(tl.float64))
    tl.store(out_ptr + 1, (large * large).to(tl.float64))
    if flag:
        tl.store(out_ptr + 2, 1.0)
    for i in range(n):
        tl.store(out_ptr + 3 + i, (i * 32768 * 32768).to(tl.float64))
