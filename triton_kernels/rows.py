"""Where a row is and what is left out of it: shared by all row kernels."""

import triton
import triton.language as tl


@triton.jit
def row_place(
    row, first, inner, outer_stride, inner_stride, UNIT: tl.constexpr, SHIFTED: tl.constexpr
):
    """Where a row's places begin, in elements from the pointer (int64), and its shift (int32).

    Row i starts at (first + (i // inner) * outer_stride + (i % inner) * inner_stride) * UNIT. With
    SHIFTED this is rounded down to a multiple of SHIFTED, and what was cut off is the shift.
    """
    offset = (first + (row // inner) * outer_stride + (row % inner) * inner_stride) * UNIT
    shift = tl.zeros([], tl.int32)
    if SHIFTED:
        shift = (offset % SHIFTED).to(tl.int32)
        offset = offset // SHIFTED * SHIFTED
    return offset, shift


@triton.jit
def target_column(token_ids_ptr, row, n_cols):
    """The row's token as int32, and whether it is in the vocabulary; column 0 stands in if not."""
    token = tl.load(token_ids_ptr + row)
    known = (token >= 0) & (token < n_cols)
    return tl.where(known, token, 0).to(tl.int32), known


@triton.jit
def target_logit(x_ptr, column, known):
    """The target's logit in float32; NaN for a token that is not in the vocabulary.

    Read before a reduction of stage 1 it is read before any thread overwrites the row.
    """
    return tl.where(known, tl.load(x_ptr + column).to(tl.float32), float("nan"))
