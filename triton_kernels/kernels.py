"""The row kernels: fused, forward only, gradient only, and the two halves of a split row.

Each is a loop over rows around the stages of softmax.py and objective.py. Kernels know pointers,
strides and numbers only. N rows of V columns; per-row arrays are contiguous and (N,), float32 if
nothing else is said, and may be None where the launcher says so.

Common arguments:
    logits_ptr, dlogits_ptr: (N, V), rows as rows.row_place says; the same memory if in place
    logits_first, logits_inner, logits_outer, logits_step, and the same of dlogits: where rows are,
        the arguments of rows.row_place; strides (outer, step) in units of UNIT elements
    SHIFTED: 0, or the elements of 16 bytes: rows start anywhere, but those of logits and dlogits
        at the same address modulo 16 bytes
    n_cols: V in units of COLUMN_UNIT
    token_ids_ptr: int64
    weights_ptr: 0: the row is not read and its gradient is zeros
    temperature_ptr, temperature_stride: one a row (1) or one for all (0)
    absent: stands for the logit of a token outside [0, V): NaN; or -inf where the rows are columns
        of longer ones, which have the token
    softcap: c where the logits are c tanh(z / c) of the z that are there; None: they are the z
    BLOCK, SEGMENT: see softmax.py; they decide the last bits of a row
Programs take every n-th row or piece of one: a launch has no more of them than run at once.
"""

import triton
import triton.language as tl

from .objective import token_loss
from .rows import row_place, target_column, target_logit
from .scalar_math import LN2, capped_target, expm1, log2e_over
from .softmax import (
    PEAKED_ENTROPY,
    find_peak,
    gradient_coefficients,
    guess_reference,
    join_target,
    merge_sums,
    multiply,
    no_sums,
    peak_gradient,
    sum_columns,
    write_gradient,
    write_zeros,
)
from .token import load_token

# Lengths and strides differ from batch to batch: no variant of a kernel may depend on them.
_PLAIN_NUMBERS = [
    "n_rows",
    "n_cols",
    "temperature_stride",
    "logits_first",
    "logits_inner",
    "logits_outer",
    "logits_step",
    "dlogits_first",
    "dlogits_inner",
    "dlogits_outer",
    "dlogits_step",
    "n_pieces",
]
_PER_ROW = [
    "token_ids_ptr",
    "weights_ptr",
    "temperature_ptr",
    "advantages_ptr",
    "old_logps_ptr",
    "token_weights_ptr",
    "ref_logps_ptr",
    "low_ptr",
    "high_ptr",
    "grad_scale_ptr",
    "loss_ptr",
    "logps_ptr",
    "entropy_ptr",
    "lse_ptr",
    "dlogps_ptr",
    "dentropy_ptr",
    "partials_ptr",
    "factors_ptr",
]


# Of a segment, that several programs share a row for.
NUMBERS = tl.constexpr(2)
NUMBERS_WITH_ENTROPY = tl.constexpr(7)

_kernel = triton.jit(do_not_specialize=_PLAIN_NUMBERS, do_not_specialize_on_alignment=_PER_ROW)


@triton.jit
def _row_scale(temperature_ptr, row, stride):
    return log2e_over(tl.load(temperature_ptr + row * stride))


@triton.jit
def _piece(piece, n_pieces, n_places, SEGMENT: tl.constexpr):
    """The places of one of the pieces that share a row; an only piece has all."""
    begin = piece * SEGMENT
    end = tl.where(n_pieces > 1, tl.minimum(begin + SEGMENT, n_places), n_places)
    return begin, tl.maximum(begin, end)


@triton.jit
def _merge_partials(
    partials_ptr, row, n_cols, scale, softcap, SEGMENT: tl.constexpr, WITH_ENTROPY: tl.constexpr
):
    """What sum_columns would have returned, from what sum_segments_kernel left; and the logit."""
    n_segments = tl.cdiv(n_cols, SEGMENT)
    EACH: tl.constexpr = NUMBERS_WITH_ENTROPY if WITH_ENTROPY else NUMBERS
    at = partials_ptr + row.to(tl.int64) * (EACH * n_segments + 1)
    ref, total, rest_ref, rest, weighted, peak, peak_at = no_sums()
    part_rest_ref, part_rest, part_weighted, part_peak, part_peak_at = (
        rest_ref,
        rest,
        weighted,
        peak,
        peak_at,
    )
    for _ in range(n_segments):
        if WITH_ENTROPY:
            part_rest_ref = tl.load(at + 2).to(tl.float32)
            part_rest = tl.load(at + 3)
            part_weighted = tl.load(at + 4)
            part_peak = tl.load(at + 5).to(tl.float32)
            part_peak_at = tl.load(at + 6).to(tl.int32)
        ref, total, rest_ref, rest, weighted, peak, peak_at = merge_sums(
            ref,
            total,
            rest_ref,
            rest,
            weighted,
            peak,
            peak_at,
            tl.load(at).to(tl.float32),
            tl.load(at + 1),
            part_rest_ref,
            part_rest,
            part_weighted,
            part_peak,
            part_peak_at,
            scale,
            WITH_ENTROPY,
        )
        at += EACH
    z_target = tl.load(at)
    if softcap is None:
        z_target = z_target.to(tl.float32)
    return ref, total, rest_ref, rest, weighted, peak, peak_at, z_target


@triton.jit
def _row_statistics(
    x_ptr,
    shift,
    partials_ptr,
    row,
    column,
    absent,
    scale,
    n_cols,
    softcap,
    BLOCK: tl.constexpr,
    SEGMENT: tl.constexpr,
    SHIFTED: tl.constexpr,
    UNROLL: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """Stage 1 of a whole row."""
    if partials_ptr is None:
        z_target = target_logit(x_ptr + shift, column, absent, softcap)
        guess, lift = guess_reference(x_ptr, shift, n_cols, column, scale, softcap, BLOCK, SHIFTED)
        ref, rest, others_ref, others, weighted, peak, peak_at = sum_columns(
            x_ptr,
            shift,
            0,
            n_cols,
            column,
            z_target,
            scale,
            guess,
            lift,
            softcap,
            BLOCK,
            SEGMENT,
            SHIFTED,
            UNROLL,
            WITH_ENTROPY,
            EVICTION,
        )
    else:
        ref, rest, others_ref, others, weighted, peak, peak_at, z_target = _merge_partials(
            partials_ptr, row, n_cols, scale, softcap, SEGMENT, WITH_ENTROPY
        )
    return join_target(
        z_target,
        scale,
        ref,
        rest,
        others_ref,
        others,
        weighted,
        peak,
        peak_at,
        absent == float("-inf"),
        WITH_ENTROPY,
    )


@_kernel
def policy_loss_kernel(
    logits_ptr,
    dlogits_ptr,  # None: no stage 3
    partials_ptr,  # from sum_segments_kernel, or None: stage 1 is done here
    token_ids_ptr,
    weights_ptr,
    temperature_ptr,
    advantages_ptr,
    old_logps_ptr,  # None: on-policy
    token_weights_ptr,  # None: 1
    ref_logps_ptr,  # None where nothing wants it
    low_ptr,  # None: the objective's own
    high_ptr,  # likewise
    grad_scale_ptr,  # () float32, or None: multiplies the gradient before it is rounded
    loss_ptr,
    logps_ptr,
    entropy_ptr,  # or None
    n_rows: tl.int32,
    n_cols: tl.int32,
    temperature_stride: tl.int32,
    logits_first: tl.int64,
    logits_inner: tl.int32,
    logits_outer: tl.int64,
    logits_step: tl.int64,
    dlogits_first: tl.int64,
    dlogits_inner: tl.int32,
    dlogits_outer: tl.int64,
    dlogits_step: tl.int64,
    n_pieces: tl.int32,  # programs that share a row's stage 3; more than 1 only with partials
    low_positive: tl.float32,
    low_negative: tl.float32,
    high_positive: tl.float32,
    high_negative: tl.float32,
    drift: tl.float32,
    p0: tl.float32,
    p1: tl.float32,
    p2: tl.float32,
    p3: tl.float32,
    p4: tl.float32,
    p5: tl.float32,
    p6: tl.float32,
    p7: tl.float32,
    kl_coef: tl.float32,
    entropy_coef: tl.float32,
    softcap,
    OBJECTIVE: tl.constexpr,
    KL: tl.constexpr,
    KL_RATIO_WEIGHTED: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    UNIT: tl.constexpr,
    COLUMN_UNIT: tl.constexpr,
    SHIFTED: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    """Stages 1 and 2, and 3 where there is a gradient to write: one read and one write of a row."""
    if partials_ptr is None:
        n_pieces = 1  # known to the compiler, which then divides nothing by it
    n_cols = n_cols * COLUMN_UNIT
    first = tl.program_id(0)
    for task in range(first, n_rows * n_pieces, tl.num_programs(0)):
        row = task // n_pieces
        piece = task % n_pieces
        x_place, shift = row_place(
            row, logits_first, logits_inner, logits_outer, logits_step, UNIT, SHIFTED
        )
        x_ptr = logits_ptr + x_place
        begin, end = _piece(piece, n_pieces, n_cols + shift, SEGMENT)
        if tl.load(weights_ptr + row) == 0:
            if dlogits_ptr is not None:
                d_place, _ = row_place(
                    row, dlogits_first, dlogits_inner, dlogits_outer, dlogits_step, UNIT, SHIFTED
                )
                write_zeros(dlogits_ptr + d_place, shift, begin, end, BLOCK, SHIFTED)
            if piece == 0:
                tl.store(loss_ptr + row, 0.0)
                tl.store(logps_ptr + row, 0.0)
                if entropy_ptr is not None:
                    tl.store(entropy_ptr + row, 0.0)
        else:
            column = target_column(token_ids_ptr, row, n_cols)
            scale = _row_scale(temperature_ptr, row, temperature_stride)
            ref, log2_total, total, exact_logp, complement, entropy, peak, peak_logp, _, _ = (
                _row_statistics(
                    x_ptr,
                    shift,
                    partials_ptr,
                    row,
                    column,
                    float("nan"),
                    scale,
                    n_cols,
                    softcap,
                    BLOCK,
                    SEGMENT,
                    SHIFTED,
                    UNROLL,
                    WITH_ENTROPY,
                    "evict_last" if dlogits_ptr is not None else "evict_first",
                )
            )
            logp = exact_logp.to(tl.float32)
            advantage, log_ratio, token_weight, kl_distance, low, high = load_token(
                row,
                exact_logp,
                advantages_ptr,
                old_logps_ptr,
                token_weights_ptr,
                ref_logps_ptr,
                low_ptr,
                high_ptr,
                low_positive,
                low_negative,
                high_positive,
                high_negative,
            )
            loss, c, h = token_loss(
                logp,
                log_ratio,
                kl_distance,
                entropy,
                advantage,
                token_weight,
                tl.load(weights_ptr + row),
                low,
                high,
                drift,
                p0,
                p1,
                p2,
                p3,
                p4,
                p5,
                p6,
                p7,
                kl_coef,
                entropy_coef,
                OBJECTIVE,
                KL,
                KL_RATIO_WEIGHTED,
            )
            if piece == 0:
                tl.store(loss_ptr + row, loss)
                tl.store(logps_ptr + row, logp)
                if entropy_ptr is not None:
                    tl.store(entropy_ptr + row, entropy)
            if dlogits_ptr is not None:
                if grad_scale_ptr is not None:
                    grad_scale = tl.load(grad_scale_ptr)
                    c *= grad_scale
                    h *= grad_scale
                constant, linear, target_value = gradient_coefficients(
                    scale, log2_total, total, exact_logp, complement, entropy, c, h, WITH_ENTROPY
                )
                d_place, _ = row_place(
                    row, dlogits_first, dlogits_inner, dlogits_outer, dlogits_step, UNIT, SHIFTED
                )
                write_gradient(
                    x_ptr,
                    dlogits_ptr + d_place,
                    shift,
                    begin,
                    end,
                    column,
                    target_value,
                    peak,
                    peak_gradient(scale, peak_logp, entropy, c, h),
                    scale,
                    ref,
                    constant,
                    linear,
                    softcap,
                    BLOCK,
                    SHIFTED,
                    UNROLL,
                    WITH_ENTROPY,
                )


@_kernel
def token_logps_kernel(
    logits_ptr,
    partials_ptr,  # from sum_segments_kernel, or None: stage 1 is done here
    token_ids_ptr,
    weights_ptr,
    temperature_ptr,
    logps_ptr,  # float64
    lse_ptr,  # float64: T * logsumexp(z / T)
    entropy_ptr,  # or None
    n_rows: tl.int32,
    n_cols: tl.int32,
    temperature_stride: tl.int32,
    logits_first: tl.int64,
    logits_inner: tl.int32,
    logits_outer: tl.int64,
    logits_step: tl.int64,
    absent: tl.float32,
    softcap,
    WITH_ENTROPY: tl.constexpr,
    UNIT: tl.constexpr,
    COLUMN_UNIT: tl.constexpr,
    SHIFTED: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    """Stage 1."""
    n_cols = n_cols * COLUMN_UNIT
    first = tl.program_id(0)
    for row in range(first, n_rows, tl.num_programs(0)):
        logp = tl.zeros([], tl.float64)
        lse_anchor = tl.zeros([], tl.float64)
        lse_above = tl.zeros([], tl.float64)
        entropy = 0.0
        if tl.load(weights_ptr + row) != 0:
            x_place, shift = row_place(
                row, logits_first, logits_inner, logits_outer, logits_step, UNIT, SHIFTED
            )
            column = target_column(token_ids_ptr, row, n_cols)
            scale = _row_scale(temperature_ptr, row, temperature_stride)
            _, _, _, logp, _, entropy, _, _, lse_anchor, lse_above = _row_statistics(
                logits_ptr + x_place,
                shift,
                partials_ptr,
                row,
                column,
                absent,
                scale,
                n_cols,
                softcap,
                BLOCK,
                SEGMENT,
                SHIFTED,
                UNROLL,
                WITH_ENTROPY,
                "evict_first",
            )
        tl.store(logps_ptr + row, logp)
        tl.store(lse_ptr + 2 * row, lse_anchor)
        tl.store(lse_ptr + 2 * row + 1, lse_above)
        if entropy_ptr is not None:
            tl.store(entropy_ptr + row, entropy)


@_kernel
def token_logps_backward_kernel(
    logits_ptr,
    dlogits_ptr,
    token_ids_ptr,
    weights_ptr,
    temperature_ptr,
    lse_ptr,
    entropy_ptr,  # None where dentropy is
    dlogps_ptr,  # or None
    dentropy_ptr,  # or None
    n_rows: tl.int32,
    n_cols: tl.int32,
    temperature_stride: tl.int32,
    logits_first: tl.int64,
    logits_inner: tl.int32,
    logits_outer: tl.int64,
    logits_step: tl.int64,
    dlogits_first: tl.int64,
    dlogits_inner: tl.int32,
    dlogits_outer: tl.int64,
    dlogits_step: tl.int64,
    n_pieces: tl.int32,  # programs that share a row
    softcap,
    UNIT: tl.constexpr,
    COLUMN_UNIT: tl.constexpr,
    SHIFTED: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    """Stage 3 from what token_logps_kernel left of stage 1."""
    n_cols = n_cols * COLUMN_UNIT
    first = tl.program_id(0)
    for task in range(first, n_rows * n_pieces, tl.num_programs(0)):
        row = task // n_pieces
        piece = task % n_pieces
        x_place, shift = row_place(
            row, logits_first, logits_inner, logits_outer, logits_step, UNIT, SHIFTED
        )
        d_place, _ = row_place(
            row, dlogits_first, dlogits_inner, dlogits_outer, dlogits_step, UNIT, SHIFTED
        )
        x_ptr = logits_ptr + x_place
        d_ptr = dlogits_ptr + d_place
        begin, end = _piece(piece, n_pieces, n_cols + shift, SEGMENT)
        c = 0.0
        if dlogps_ptr is not None:
            c = tl.load(dlogps_ptr + row)
        h = 0.0
        if dentropy_ptr is not None:
            # dH/dlogit_v = -p_v (log p_v + H): the negative of what an entropy bonus brings.
            h = -tl.load(dentropy_ptr + row)
        if (tl.load(weights_ptr + row) == 0) | ((c == 0) & (h == 0)):
            write_zeros(d_ptr, shift, begin, end, BLOCK, SHIFTED)
        else:
            column = target_column(token_ids_ptr, row, n_cols)
            scale = _row_scale(temperature_ptr, row, temperature_stride)
            lse_anchor = tl.load(lse_ptr + 2 * row)
            lse_above = tl.load(lse_ptr + 2 * row + 1)
            log2_total = (lse_anchor + lse_above) * scale.to(tl.float64)
            ref = tl.floor(log2_total.to(tl.float32))
            log2_sum = log2_total - ref.to(tl.float64)
            total = tl.exp2(log2_sum.to(tl.float32))
            # Only the piece that holds the target may read its logit: another program may have
            # overwritten it. Within the program there is no barrier either, but nothing except
            # target_value may depend on the logit: the thread that stores it has loaded it before.
            logp = log2_sum
            place = column + shift
            if (column >= 0) & (place >= begin) & (place < end):
                z = tl.load(x_ptr + place).to(tl.float64)
                if softcap is not None:
                    z = capped_target(z, softcap)
                logp = (z - lse_anchor - lse_above) * scale.to(tl.float64) * LN2
            logp32 = logp.to(tl.float32)
            entropy = 0.0
            peak = -1
            peak_value = 0.0
            if dentropy_ptr is not None:
                entropy = tl.load(entropy_ptr + row)
                if (h != 0) & (entropy < PEAKED_ENTROPY):
                    # A row's peak has more than half of its mass: only one piece can have it.
                    z, place = find_peak(
                        x_ptr, begin, shift, end, column + shift, softcap, BLOCK, SHIFTED
                    )
                    peak_logp = z.to(tl.float64) - lse_anchor - lse_above
                    peak_logp *= scale.to(tl.float64) * LN2
                    peak = tl.where(peak_logp > -LN2, place - shift, -1)
                    peak_value = peak_gradient(scale, peak_logp.to(tl.float32), entropy, c, h)
            constant, linear, target_value = gradient_coefficients(
                scale,
                log2_sum,
                total,
                logp,
                -expm1(logp32),
                entropy,
                c,
                h,
                dentropy_ptr is not None,
            )
            write_gradient(
                x_ptr,
                d_ptr,
                shift,
                begin,
                end,
                column,
                target_value,
                peak,
                peak_value,
                scale,
                ref,
                constant,
                linear,
                softcap,
                BLOCK,
                SHIFTED,
                UNROLL,
                dentropy_ptr is not None,
            )


@_kernel
def sum_segments_kernel(
    logits_ptr,
    partials_ptr,  # (N, NUMBERS * segments + 1) float64: what sum_columns returns; the logit
    token_ids_ptr,
    weights_ptr,
    temperature_ptr,
    n_rows: tl.int32,
    n_cols: tl.int32,
    temperature_stride: tl.int32,
    logits_first: tl.int64,
    logits_inner: tl.int32,
    logits_outer: tl.int64,
    logits_step: tl.int64,
    absent: tl.float32,
    softcap,
    WITH_ENTROPY: tl.constexpr,
    UNIT: tl.constexpr,
    COLUMN_UNIT: tl.constexpr,
    SHIFTED: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    """Stage 1 of few rows, a program a segment; the same sums as those of a whole row."""
    n_cols = n_cols * COLUMN_UNIT
    n_segments = tl.cdiv(n_cols, SEGMENT)
    row = tl.program_id(0) // n_segments
    segment = tl.program_id(0) % n_segments
    if tl.load(weights_ptr + row) != 0:
        x_place, shift = row_place(
            row, logits_first, logits_inner, logits_outer, logits_step, UNIT, SHIFTED
        )
        x_ptr = logits_ptr + x_place
        column = target_column(token_ids_ptr, row, n_cols)
        scale = _row_scale(temperature_ptr, row, temperature_stride)
        guess, lift = guess_reference(x_ptr, shift, n_cols, column, scale, softcap, BLOCK, SHIFTED)
        begin = segment * SEGMENT
        z_target = target_logit(x_ptr + shift, column, absent, softcap)
        ref, total, rest_ref, rest, weighted, peak, peak_at = sum_columns(
            x_ptr,
            shift,
            begin,
            tl.minimum(begin + SEGMENT, n_cols),
            column,
            z_target,
            scale,
            guess,
            lift,
            softcap,
            BLOCK,
            SEGMENT,
            SHIFTED,
            UNROLL,
            WITH_ENTROPY,
            "evict_last",
        )
        EACH: tl.constexpr = NUMBERS_WITH_ENTROPY if WITH_ENTROPY else NUMBERS
        of_row = partials_ptr + row.to(tl.int64) * (EACH * n_segments + 1)
        own = of_row + EACH * segment
        tl.store(own, ref.to(tl.float64))
        tl.store(own + 1, total)
        if WITH_ENTROPY:
            tl.store(own + 2, rest_ref.to(tl.float64))
            tl.store(own + 3, rest)
            tl.store(own + 4, weighted)
            tl.store(own + 5, peak.to(tl.float64))
            tl.store(own + 6, peak_at.to(tl.float64))
        if segment == 0:
            tl.store(of_row + EACH * n_segments, z_target.to(tl.float64))


@_kernel
def multiply_rows_kernel(
    logits_ptr,
    factors_ptr,
    n_rows: tl.int32,
    n_cols: tl.int32,
    logits_first: tl.int64,
    logits_inner: tl.int32,
    logits_outer: tl.int64,
    logits_step: tl.int64,
    UNIT: tl.constexpr,
    COLUMN_UNIT: tl.constexpr,
    SHIFTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x[i] *= factors[i]; where the factor is 1 the row is not touched."""
    n_cols = n_cols * COLUMN_UNIT
    first = tl.program_id(0)
    for row in range(first, n_rows, tl.num_programs(0)):
        factor = tl.load(factors_ptr + row)
        if factor != 1:
            place, shift = row_place(
                row, logits_first, logits_inner, logits_outer, logits_step, UNIT, SHIFTED
            )
            multiply(logits_ptr + place, shift, n_cols + shift, factor, BLOCK, SHIFTED)
