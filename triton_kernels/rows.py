"""Where a row is and what is left out of it: shared by all row kernels."""

import triton
import triton.language as tl

from .scalar_math import capped_target


@triton.jit
def row_place(
    row, first, inner, outer_stride, inner_stride, UNIT: tl.constexpr, SHIFTED: tl.constexpr
):
    """Where a row's places begin, in elements from the pointer (int64), and its shift (int32).

    Row i starts at (first + (i // inner) * outer_stride + (i % inner) * inner_stride) * UNIT. With
    SHIFTED this is rounded down to a multiple of SHIFTED, and what was cut off is the shift.
    """
    outer = (row // inner).to(tl.int64) * outer_stride
    offset = (first + outer + (row % inner).to(tl.int64) * inner_stride) * UNIT
    shift = tl.zeros([], tl.int32)
    if SHIFTED:
        shift = (offset % SHIFTED).to(tl.int32)
        offset = offset // SHIFTED * SHIFTED
    return offset, shift


@triton.jit
def target_column(token_ids_ptr, row, n_cols):
    """The row's token as int32, or -1 where it is none of the columns."""
    token = tl.load(token_ids_ptr + row)
    return tl.where((token >= 0) & (token < n_cols), token, -1).to(tl.int32)


@triton.jit
def target_logit(x_ptr, column, absent, softcap):
    """The target's logit, in float64 if it has been capped, else in float32; `absent` for a token
    that is none of the columns.

    Read before a reduction of stage 1 it is read before any thread overwrites the row.
    """
    logit = tl.load(x_ptr + tl.maximum(column, 0)).to(tl.float32)
    if softcap is not None:
        logit = capped_target(logit.to(tl.float64), softcap)
    return tl.where(column >= 0, logit, absent)
