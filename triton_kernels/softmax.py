"""Stages 1 and 3 of a row: the sum of its exponentials, and its gradient. docs/triton.md says why.

In units of log2, with scale = log2(e) / T and an integer `ref` near the row's maximum,

    u_v = z_v scale - ref        sum = sum_v 2^u_v        p_v = 2^u_v / sum

The target is left out of the sums and joined at the end, so that 1 - p and log p of a likely token
keep their relative accuracy. Where an entropy is wanted, so is the likeliest other element, the
*peak*, of rows where it has nearly all the mass: H and log p of it are then small differences too.

A row is summed in segments of SEGMENT columns, BLOCK lanes wide: lane l adds the columns v = l mod
BLOCK of its segment in float32, in order, and the lanes are then added as 64-bit fixed-point
numbers. Integers add up to the same in any order, so the result does not depend on how the
compiler lays the lanes out: neither on the alignment, nor the number of warps, nor the kernel.

Rows may start at any address. Column v of a row is at *place* v + shift of x_ptr: where SHIFTED,
x_ptr is an aligned address up to 7 elements before the row, so that whole blocks are aligned and
their accesses 128 bits wide, whatever V is; otherwise shift is 0. Places before the row and behind
it are not touched. Columns and places are int32.
"""

import triton
import triton.language as tl

from .scalar_math import LN2, LOG2E, capped, log1p_near, log2, power_of_two

# References beyond are floats too far apart to be near anything: such a row is NaN.
LARGEST_REF = tl.constexpr(2147483648.0)
# Lanes are brought below 2^8, the largest to 2^7 or more, and count in multiples of 2^-41: 2^13 of
# them fit 62 bits. Those rounded to nothing are, at 2^-42 each, at most 2^-36 of a segment's sum.
_FIXED = tl.constexpr(2.0**41)
_FIXED_WEIGHTED = tl.constexpr(2.0**34)  # its lanes are below 2^15.3: |u| < 150 where 2^u is not 0
_LANE_LIMIT = tl.constexpr(2.0**8)
# A lane with more of a segment than this has an element that may be the row's peak.
_PEAKED = tl.constexpr(0.875)
# Below, 1 - p of the likeliest token is at most 5e-3, and float32 begins to lose log p + H.
PEAKED_ENTROPY = tl.constexpr(0.02)
_NO_PLACE = tl.constexpr(2**31 - 1)
_LOWEST = tl.constexpr(-1024.0)  # 0 * -inf would be NaN; 2^-1024 is far below the smallest float


@triton.jit
def _inside(start, first, end, BLOCK: tl.constexpr, SHIFTED: tl.constexpr):
    """Which of a block's places are in [first, end); first is not looked at without a shift."""
    places = start + tl.arange(0, BLOCK)
    inside = places < end
    if SHIFTED:  # a second condition would make the accesses narrow
        inside = inside & (places >= first)
    return inside


@triton.jit
def _load_edge(x_ptr, start, first, end, BLOCK: tl.constexpr, SHIFTED: tl.constexpr, softcap=None):
    """A block that may reach beyond places [first, end); -inf there."""
    places = start + tl.arange(0, BLOCK)
    inside = _inside(start, first, end, BLOCK, SHIFTED)
    x = tl.load(x_ptr + places, mask=inside, other=float("-inf"))
    if softcap is not None:
        x = tl.where(inside, capped(x.to(tl.float32), softcap), float("-inf"))
    return x


@triton.jit
def _load_ahead(x_ptr, start, wanted, BLOCK: tl.constexpr, EVICTION: tl.constexpr):
    """A whole block, or nothing. One condition for all lanes leaves the access wide."""
    places = start + tl.arange(0, BLOCK)
    # A block of conditions: Triton 3.9's interpreter makes integers of a single one.
    mask = tl.full([BLOCK], wanted.to(tl.int32), tl.int32) != 0
    return tl.load(x_ptr + places, mask=mask, other=0, eviction_policy=EVICTION)


@triton.jit
def _is_lane(lane, BLOCK: tl.constexpr):
    """Which of a block's lanes is this one.

    In two parts, of which one is a constant where a thread has neighbours. Of `lanes == lane`
    compilers keep a register for each lane of a thread, through all loops of a row.
    """
    lanes = tl.arange(0, BLOCK)
    return (lanes % 8 == lane % 8) & (lanes // 8 == lane // 8)


@triton.jit
def _without(x, start, place, BLOCK: tl.constexpr):
    """A block in float32 whose element at `place` is -inf, if it is there.

    A branch, because a comparison would cost every element a quarter of its instructions; and
    converted before it, since behind a branch 16-bit elements are no longer two to a register.
    """
    x = x.to(tl.float32)
    if (place >= start) & (place < start + BLOCK):
        x = tl.where(_is_lane(place - start, BLOCK), float("-inf"), x)
    return x


@triton.jit
def _add_block(sums, weighted, x, scale, ref, WEIGHTED: tl.constexpr):
    u = tl.fma(x, scale, -ref)
    e = tl.exp2(u)
    sums += e
    if WEIGHTED:
        weighted = tl.fma(tl.maximum(u, _LOWEST), e, weighted)
    return sums, weighted


@triton.jit
def _largest(x):
    """The maximum of float32 lanes, as that of integers in the same order.

    From sm_80 on a warp has one instruction for it. Shuffles are calls of functions on sm_80 where
    the compiler cannot prove that a warp is together, and need registers to spare.
    """
    bits = x.to(tl.int32, bitcast=True)
    top = tl.max(bits ^ ((bits >> 31) & 0x7FFFFFFF))
    return (top ^ ((top >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _reference(top, scale):
    """The reference for a largest element, and its lift: where 2^u of that element lies.

    The lift is 0 or 1 up to |top| scale = 2^24; beyond, float32 numbers are too far apart for an
    integer near the maximum, and the lift makes up for it.
    """
    # Only bans, by -inf or -1e10, say: zeros beside any row that is not NaN.
    ref = tl.maximum(tl.ceil(top * scale), -LARGEST_REF)
    lift = tl.ceil(tl.fma(top, scale, -ref))
    return ref, tl.where(tl.abs(lift) <= 128, lift, 0.0)


@triton.jit
def _total(sums, weighted, lift, WEIGHTED: tl.constexpr):
    """The largest lane, the lanes' sum and their weighted sum; the latter two in float64.

    Where a lane is NaN or, times 2^-lift, beyond the limit, the first is inf and the second NaN.
    """
    fits = sums * power_of_two(-lift) < _LANE_LIMIT
    top = _largest(tl.where(fits, sums, float("inf")))
    # 2^e <= top < 2^(e + 1): times 2^(7 - e), and back; e is at least -110.
    exponent = tl.maximum(top.to(tl.int32, bitcast=True) >> 23, 127 - 110)
    factor = ((2 * 127 + 7 - exponent) << 23).to(tl.float32, bitcast=True)
    up = ((exponent - 7) << 23).to(tl.float32, bitcast=True).to(tl.float64)
    fixed = tl.where(fits, tl.floor(sums * factor * _FIXED + 0.5), 0.0)
    total = tl.sum(fixed.to(tl.int64)).to(tl.float64) * (up * (1 / _FIXED))
    total = tl.where(top < float("inf"), total, float("nan"))
    total_weighted = tl.zeros([], tl.float64)
    if WEIGHTED:
        fixed = tl.where(fits, tl.floor(weighted * factor * _FIXED_WEIGHTED + 0.5), 0.0)
        total_weighted = tl.sum(fixed.to(tl.int64)).to(tl.float64) * (up * (1 / _FIXED_WEIGHTED))
    return top, total, total_weighted


@triton.jit
def _sum_again(
    x_ptr,
    segment,
    first,
    end,
    target,
    peak,
    scale,
    BLOCK: tl.constexpr,
    SHIFTED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    softcap,
):
    """Sums a segment, but places `target` and `peak`, with a reference of its own."""
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(segment, end, BLOCK):
        x = _load_edge(x_ptr, start, first, end, BLOCK, SHIFTED, softcap)
        x = _without(_without(x, start, target, BLOCK), start, peak, BLOCK)
        top = tl.maximum(top, x)
    ref, lift = _reference(_largest(top), scale)
    sums = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    for start in range(segment, end, BLOCK):
        x = _load_edge(x_ptr, start, first, end, BLOCK, SHIFTED, softcap)
        x = _without(_without(x, start, target, BLOCK), start, peak, BLOCK)
        sums, weighted = _add_block(sums, weighted, x, scale, ref, WEIGHTED)
    largest, total, total_weighted = _total(sums, weighted, lift, WEIGHTED)
    return ref, largest, total, total_weighted


@triton.jit
def find_peak(
    x_ptr, begin, first, end, target, softcap, BLOCK: tl.constexpr, SHIFTED: tl.constexpr
):
    """The largest element of [max(begin, first), end) but the target, and its place.

    begin is a multiple of BLOCK. Of equal ones the first; a NaN may be passed over.
    """
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    places = tl.full([BLOCK], _NO_PLACE, tl.int32)
    for start in range(begin, end, BLOCK):
        x = _load_edge(x_ptr, start, first, end, BLOCK, SHIFTED, softcap)
        x = _without(x, start, target, BLOCK)
        here = start + tl.arange(0, BLOCK)
        better = x > top
        top = tl.where(better, x, top)
        places = tl.where(better, here, places)
    largest = _largest(top)
    return largest, -tl.max(tl.where(top == largest, -places, -_NO_PLACE))


@triton.jit
def guess_reference(
    x_ptr, shift, n_cols, target, scale, softcap, BLOCK: tl.constexpr, SHIFTED: tl.constexpr
):
    """A reference from the row's first columns and its lift, which is NaN if there is none.

    Any reference gives the same sum; only overflow and underflow matter. Since these columns take
    part in the sum, the sum cannot vanish; segments that overflow find their own.
    """
    # The same columns whatever the shift.
    end = shift + tl.minimum(n_cols, BLOCK - 16)
    x = _load_edge(x_ptr, 0, shift, end, BLOCK, SHIFTED, softcap)
    ref, lift = _reference(_largest(_without(x, 0, target + shift, BLOCK)), scale)
    usable = tl.abs(ref) < LARGEST_REF
    return tl.where(usable, ref, 0.0), tl.where(usable, lift, float("nan"))


@triton.jit
def _merge(ref, total, weighted, part_ref, part_total, part_weighted):
    """Two partial sums of a row, float64, at the larger of their references.

    Exact powers of two, since a row that several programs share is merged once more than one that
    has a single program, and has to give the same bits.
    """
    top = tl.maximum(ref, part_ref)
    down = power_of_two(ref - top).to(tl.float64)
    part_down = power_of_two(part_ref - top).to(tl.float64)
    weighted = ((ref - top) * total + weighted) * down
    part_weighted = ((part_ref - top) * part_total + part_weighted) * part_down
    return top, total * down + part_total * part_down, weighted + part_weighted


@triton.jit
def no_sums():
    """What merge_sums starts from."""
    zero = tl.zeros([], tl.float64)
    ref = tl.full([], -LARGEST_REF, tl.float32)
    peak = tl.full([], float("-inf"), tl.float32)
    return ref, zero, ref, zero, zero, peak, tl.full([], -1, tl.int32)


@triton.jit
def _with_element(ref, total, weighted, x, scale):
    """Sums to which an element is added in float64; nothing for -inf."""
    u = tl.where(x > float("-inf"), x, 0.0).to(tl.float64) * scale.to(tl.float64)
    own = tl.ceil(u.to(tl.float32))
    u -= own.to(tl.float64)
    mass = tl.where(x > float("-inf"), tl.exp2(u.to(tl.float32)), 0.0).to(tl.float64)
    own = tl.where(x > float("-inf"), own, -LARGEST_REF)
    return _merge(ref, total, weighted, own, mass, u * mass)


@triton.jit
def merge_sums(
    ref,
    total,
    rest_ref,
    rest,
    weighted,
    peak,
    peak_at,
    part_ref,
    part_total,
    part_rest_ref,
    part_rest,
    part_weighted,
    part_peak,
    part_peak_at,
    scale,
    WEIGHTED: tl.constexpr,
):
    """The sums of two parts of a row, the later one second: see sum_columns."""
    ref, total, _ = _merge(ref, total, 0.0, part_ref, part_total, 0.0)
    if WEIGHTED:
        if part_peak_at >= 0:
            rest_ref, rest, weighted = _with_element(
                rest_ref, rest, weighted, tl.minimum(peak, part_peak), scale
            )
            peak_at = tl.where(part_peak > peak, part_peak_at, peak_at)
            peak = tl.maximum(part_peak, peak)
        rest_ref, rest, weighted = _merge(
            rest_ref, rest, weighted, part_rest_ref, part_rest, part_weighted
        )
    return ref, total, rest_ref, rest, weighted, peak, peak_at


@triton.jit
def sum_columns(
    x_ptr,
    shift,
    begin,
    end,
    target,
    z_target,
    scale,
    guess,
    guess_lift,
    softcap,
    BLOCK: tl.constexpr,
    SEGMENT: tl.constexpr,
    SHIFTED: tl.constexpr,
    UNROLL: tl.constexpr,
    WEIGHTED: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """Stage 1 over columns [begin, end), but the target; begin is a multiple of SEGMENT.

    Returns, the sums in float64:
        ref, sum;
        ref of the others, their sum, their sum of u 2^u: of all but the peak, where WEIGHTED;
        the peak's logit and column, -inf and -1 where no element has nearly all of its segment and
        more than the target.
    EVICTION: "evict_last" where stage 3 will read the row again.
    """
    # With a shift, a segment's first block is cut off in front and its last one behind.
    FIRST: tl.constexpr = BLOCK if SHIFTED else 0
    end += shift
    target += shift
    ref, total, rest_ref, rest, weighted, peak, peak_at = no_sums()
    # The next block is on its way while one is worked on, also across the end of a segment.
    x = _load_ahead(x_ptr, begin + FIRST, begin + FIRST + BLOCK <= end, BLOCK, EVICTION)
    for segment in range(begin, end - shift, SEGMENT):
        segment_first = segment + shift
        segment_end = tl.minimum(segment_first + SEGMENT, end)
        whole_end = segment + (segment_end - segment) // BLOCK * BLOCK
        sums = tl.zeros([BLOCK], tl.float32)
        weighted_sums = tl.zeros([BLOCK], tl.float32)
        if SHIFTED:
            edge = _load_edge(x_ptr, segment, segment_first, segment_end, BLOCK, SHIFTED, softcap)
            edge = _without(edge, segment, target, BLOCK)
            sums, weighted_sums = _add_block(sums, weighted_sums, edge, scale, guess, WEIGHTED)
        for start in tl.range(segment + FIRST, whole_end, BLOCK, loop_unroll_factor=UNROLL):
            following = start + BLOCK
            if SHIFTED:
                following = tl.where(following < whole_end, following, segment + SEGMENT + FIRST)
            ahead = _load_ahead(x_ptr, following, following + BLOCK <= end, BLOCK, EVICTION)
            if softcap is not None:
                x = capped(x.to(tl.float32), softcap)
            x = _without(x, start, target, BLOCK)
            sums, weighted_sums = _add_block(sums, weighted_sums, x, scale, guess, WEIGHTED)
            x = ahead
        tail = tl.maximum(whole_end, segment + FIRST)
        if tail < segment_end:
            edge = _load_edge(x_ptr, tail, segment_first, segment_end, BLOCK, SHIFTED, softcap)
            edge = _without(edge, tail, target, BLOCK)
            sums, weighted_sums = _add_block(sums, weighted_sums, edge, scale, guess, WEIGHTED)
        part_ref = guess
        largest, part, part_weighted = _total(sums, weighted_sums, guess_lift, WEIGHTED)
        if largest == float("inf"):
            part_ref, largest, part, part_weighted = _sum_again(
                x_ptr,
                segment,
                segment_first,
                segment_end,
                target,
                target,
                scale,
                BLOCK,
                SHIFTED,
                WEIGHTED,
                softcap,
            )
        rest_part_ref = part_ref
        rest_part = part
        part_peak = tl.full([], float("-inf"), tl.float32)
        part_peak_at = tl.full([], -1, tl.int32)
        if WEIGHTED:
            asked = tl.exp2(tl.fma(z_target.to(tl.float32), scale, -part_ref))
            if (largest > part * _PEAKED) & (largest > asked):
                part_peak, place = find_peak(
                    x_ptr, segment, segment_first, segment_end, target, softcap, BLOCK, SHIFTED
                )
                part_peak_at = place - shift
                rest_part_ref, _, rest_part, part_weighted = _sum_again(
                    x_ptr,
                    segment,
                    segment_first,
                    segment_end,
                    target,
                    place,
                    scale,
                    BLOCK,
                    SHIFTED,
                    WEIGHTED,
                    softcap,
                )
        ref, total, rest_ref, rest, weighted, peak, peak_at = merge_sums(
            ref,
            total,
            rest_ref,
            rest,
            weighted,
            peak,
            peak_at,
            part_ref,
            part,
            rest_part_ref,
            rest_part,
            part_weighted,
            part_peak,
            part_peak_at,
            scale,
            WEIGHTED,
        )
    return ref, total, rest_ref, rest, weighted, peak, peak_at


@triton.jit
def _near_logp(mass, others):
    """log p in float64 of an element with a mass beside that of all others, and whether it is so
    likely that this is what to take: the difference of logarithms would keep few digits."""
    near = mass > 4 * others
    log, correction = log1p_near(tl.where(near, others / mass, 0.0))
    return 0.0 - (log.to(tl.float64) + correction.to(tl.float64)), near


@triton.jit
def join_target(
    z_target,
    scale,
    ref,
    rest,
    others_ref,
    others,
    weighted,
    peak,
    peak_at,
    sharded,
    WITH_ENTROPY: tl.constexpr,
):
    """Joins the target with the sums over the rest of its row.

    A shard that has bans alone has no mass; a whole row of them is NaN.

    Returns (ref, log2 of the sum in float64, the sum, logp in float64, 1 - p, entropy, the peak's
    column or -1, log p of the peak, the two numbers of lse in float64), float32 unless said
    otherwise. Without an entropy no row has a peak. A few operations are in float64, which is slow
    on some GPUs, but cheap beside a row: float32 would round log p to 1e-6, and near r* the
    gradient is a difference.
    """
    u = z_target.to(tl.float64) * scale.to(tl.float64)
    top = tl.maximum(ref, tl.ceil(u.to(tl.float32)))
    empty = sharded & (top <= -LARGEST_REF) & (z_target == z_target) & (rest == rest)
    top = tl.where(tl.abs(top) < LARGEST_REF, top, float("nan"))
    gap = u - top.to(tl.float64)
    mass = tl.exp2(gap.to(tl.float32))
    _, rest, _ = _merge(ref, rest, 0.0, top, 0.0, 0.0)
    exact_total = rest + mass.to(tl.float64)
    total = exact_total.to(tl.float32)
    rest32 = rest.to(tl.float32)
    lost = (exact_total - total.to(tl.float64)).to(tl.float32) / total * LOG2E
    log2_total = log2(total) + lost.to(tl.float64)
    logp = (gap - log2_total) * LN2
    near_logp, near = _near_logp(mass, rest32)
    logp = tl.where(near, near_logp, logp)
    log2_total = tl.where(near, gap - near_logp * LOG2E, log2_total)
    # See lse.py: where one token has nearly all the mass its logit and log p, else the reference.
    unit = 1.0 / scale.to(tl.float64)
    lse_anchor = tl.where(near, z_target.to(tl.float64), top.to(tl.float64) * unit)
    lse_above = tl.where(near, -near_logp * LOG2E, log2_total) * unit
    entropy = tl.zeros([], tl.float32)
    peak_logp = tl.zeros([], tl.float32)
    if WITH_ENTROPY:
        up = power_of_two(others_ref - top).to(tl.float64)
        weighted = ((others_ref - top) * others + weighted) * up
        others *= up
        own_mass = mass
        own_logp = logp
        if peak_at >= 0:
            peak_gap = peak.to(tl.float64) * scale.to(tl.float64) - top.to(tl.float64)
            peak_mass = tl.exp2(peak_gap.to(tl.float32))
            likelier = peak_mass > mass
            lesser = tl.minimum(peak_mass, mass).to(tl.float64)
            others += lesser
            weighted += tl.where(lesser == 0, 0.0, tl.where(likelier, gap, peak_gap) * lesser)
            near_logp, near = _near_logp(peak_mass, others.to(tl.float32))
            near = near & likelier
            peak_at = tl.where(near, peak_at, -1)
            log2_total = tl.where(near, peak_gap - near_logp * LOG2E, log2_total)
            lse_anchor = tl.where(near, peak.to(tl.float64), lse_anchor)
            lse_above = tl.where(near, -near_logp * (LOG2E * unit), lse_above)
            near_logp = tl.where(near, near_logp, (peak_gap - log2_total) * LN2)
            own_logp = tl.where(likelier, near_logp, own_logp)
            own_mass = tl.where(likelier, peak_mass, own_mass)
            peak_logp = near_logp.to(tl.float32)
        # The share of the likeliest apart: where it has nearly all the mass, the others' terms are
        # small.
        own = tl.where(own_mass == 0, 0.0, -own_logp.to(tl.float32) * own_mass)
        of_others = (log2_total * others - weighted) * LN2
        entropy = tl.where(empty, 0.0, (own + of_others.to(tl.float32)) / total)
    logp = tl.where(empty, float("-inf"), logp)
    log2_total = tl.where(empty, float("-inf"), log2_total)
    return (
        tl.where(empty, 0.0, top),
        log2_total,
        total,
        logp,
        rest32 / total,
        entropy,
        peak_at,
        peak_logp,
        tl.where(empty, 0.0, lse_anchor),
        tl.where(empty, float("-inf"), lse_above),
    )


@triton.jit
def gradient_coefficients(
    scale, log2_total, total, logp, complement, entropy, c, h, WITH_ENTROPY: tl.constexpr
):
    """d_v = 2^u_v (constant + linear u_v) off the target, and the target's own value."""
    inv_t = scale * LN2
    target = inv_t * (c * complement)
    level = -c
    if WITH_ENTROPY:
        logp = logp.to(tl.float32)
        p = tl.exp2(logp * LOG2E)
        target += tl.where((h == 0) | (p == 0), 0.0, inv_t * (h * p * (logp + entropy)))
        level += h * (entropy - log2_total.to(tl.float32) * LN2)
    return inv_t * level / total, inv_t * h * LN2 / total, target


@triton.jit
def peak_gradient(scale, logp, entropy, c, h):
    """The value of the peak's element: a difference that float32 coefficients would lose."""
    return scale * LN2 * tl.exp2(logp * LOG2E) * (h * (logp + entropy) - c)


@triton.jit
def _gradient_block(
    x,
    start,
    target,
    target_value,
    peak,
    peak_value,
    scale,
    ref,
    constant,
    linear,
    softcap,
    BLOCK: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
):
    x = x.to(tl.float32)
    if softcap is not None:
        x = capped(x, softcap)
    u = tl.fma(x, scale, -ref)
    factor = constant
    if WITH_ENTROPY:
        factor = tl.fma(linear, tl.maximum(u, _LOWEST), constant)
    d = tl.exp2(u) * factor
    # Blocks start at multiples of BLOCK: in the same one only the lane differs.
    if WITH_ENTROPY:
        lane = start ^ peak
        if (lane >= 0) & (lane < BLOCK):
            d = tl.where(_is_lane(lane, BLOCK), peak_value, d)
    lane = start ^ target
    if (lane >= 0) & (lane < BLOCK):
        d = tl.where(_is_lane(lane, BLOCK), target_value, d)
    if softcap is not None:
        t = x * (1.0 / softcap)
        d *= tl.maximum(tl.fma(-t, t, 1.0), 0.0)  # |x| may be rounded to more than the softcap
    return d


@triton.jit
def write_gradient(
    x_ptr,
    d_ptr,
    shift,
    begin,
    end,
    target,
    target_value,
    peak,
    peak_value,
    scale,
    ref,
    constant,
    linear,
    softcap,
    BLOCK: tl.constexpr,
    SHIFTED: tl.constexpr,
    UNROLL: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
):
    """Stage 3 at places [begin, end), backwards: what stage 1 read last is in the cache still.

    begin is a multiple of BLOCK. x and d may be the same memory. softcap: see kernels.py.
    """
    lanes = tl.arange(0, BLOCK)
    dtype = d_ptr.dtype.element_ty
    target += shift
    peak += shift
    n_whole = (end - begin) // BLOCK
    tail = begin + n_whole * BLOCK
    if tail < end:
        x = _load_edge(x_ptr, tail, shift, end, BLOCK, SHIFTED)
        places = tail + lanes
        d = _gradient_block(
            x,
            tail,
            target,
            target_value,
            peak,
            peak_value,
            scale,
            ref,
            constant,
            linear,
            softcap,
            BLOCK,
            WITH_ENTROPY,
        )
        tl.store(d_ptr + places, d.to(dtype), mask=_inside(tail, shift, end, BLOCK, SHIFTED))

    first = begin
    if SHIFTED:
        first += tl.where((begin < shift) & (n_whole > 0), BLOCK, 0)
    x = _load_ahead(x_ptr, tail - BLOCK, first < tail, BLOCK, "evict_first")
    for done in tl.range(first, tail, BLOCK, loop_unroll_factor=UNROLL):
        start = tail - BLOCK - (done - first)
        ahead = _load_ahead(x_ptr, start - BLOCK, first < start, BLOCK, "evict_first")
        places = start + lanes
        d = _gradient_block(
            x,
            start,
            target,
            target_value,
            peak,
            peak_value,
            scale,
            ref,
            constant,
            linear,
            softcap,
            BLOCK,
            WITH_ENTROPY,
        )
        tl.store(d_ptr + places, d.to(dtype), eviction_policy="evict_first")
        x = ahead
    if SHIFTED:  # noqa: SIM102
        if first > begin:
            x = _load_edge(x_ptr, begin, shift, end, BLOCK, SHIFTED)
            places = begin + lanes
            d = _gradient_block(
                x,
                begin,
                target,
                target_value,
                peak,
                peak_value,
                scale,
                ref,
                constant,
                linear,
                softcap,
                BLOCK,
                WITH_ENTROPY,
            )
            tl.store(d_ptr + places, d.to(dtype), mask=places >= shift)


@triton.jit
def write_zeros(d_ptr, shift, begin, end, BLOCK: tl.constexpr, SHIFTED: tl.constexpr):
    """Zeros at places [begin, end) from `shift` on."""
    zeros = tl.zeros([BLOCK], d_ptr.dtype.element_ty)
    for start in range(begin, end, BLOCK):
        places = start + tl.arange(0, BLOCK)
        if (start >= shift) & (start + BLOCK <= end):
            tl.store(d_ptr + places, zeros, eviction_policy="evict_first")
        else:
            tl.store(d_ptr + places, zeros, mask=_inside(start, shift, end, BLOCK, SHIFTED))


@triton.jit
def multiply(x_ptr, shift, end, factor, BLOCK: tl.constexpr, SHIFTED: tl.constexpr):
    """Multiplies places [shift, end) by a number."""
    dtype = x_ptr.dtype.element_ty
    for start in range(0, end, BLOCK):
        places = start + tl.arange(0, BLOCK)
        if (start >= shift) & (start + BLOCK <= end):
            x = tl.load(x_ptr + places)
            tl.store(x_ptr + places, (x.to(tl.float32) * factor).to(dtype))
        else:
            inside = _inside(start, shift, end, BLOCK, SHIFTED)
            x = tl.load(x_ptr + places, mask=inside, other=0)
            tl.store(x_ptr + places, (x.to(tl.float32) * factor).to(dtype), mask=inside)
