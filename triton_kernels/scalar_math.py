"""Elementary functions that Triton lacks, for float32: same results compiled and interpreted.

libdevice has them, but the interpreter does not know it and other vendors spell it differently.
They run once a row. Every fused multiply-add is spelled out: kernels are compiled without
contraction, so that two kernels that share a function round alike.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# ln 2 in two parts; a small whole number times the first is exact in float32.
_LN2_HIGH = tl.constexpr(0.693359375)
_LN2_LOW = tl.constexpr(-2.12194440e-4)


# log2(e) = the float32 next to it + this.
_LOG2E_LOW = tl.constexpr(1.92596299e-8)


@triton.jit
def log2e_over(t):
    """log2(e) / t, rounded once: an error here is one of the temperature, in every logit."""
    quotient = LOG2E / t  # to a few units; the rest makes up for it
    rest = tl.fma(-quotient, t, LOG2E) + _LOG2E_LOW
    return quotient + rest / t


@triton.jit
def power_of_two(n):
    """2^n of a whole number in float32, put together from bits: exact, unlike a GPU's exp2.

    0 below -126, as exp2 has it, inf from 128 on, NaN for NaN.
    """
    exponent = tl.maximum(tl.minimum(n, 128.0), -127.0).to(tl.int32) + 127
    return tl.where(n == n, (exponent << 23).to(tl.float32, bitcast=True), n)


@triton.jit
def _exp_parts(x):
    """2^(n - 1) and e with e^x = 2^n (1 + e), |e| <= 0.42."""
    n = tl.floor(x * LOG2E + 0.5)
    f = tl.fma(n, -_LN2_LOW, tl.fma(n, -_LN2_HIGH, x))  # |f| <= ln(2) / 2
    p = 1.0 / 5040
    p = tl.fma(p, f, 1.0 / 720)
    p = tl.fma(p, f, 1.0 / 120)
    p = tl.fma(p, f, 1.0 / 24)
    p = tl.fma(p, f, 1.0 / 6)
    p = tl.fma(p, f, 0.5)
    # 2^n itself would overflow a little early.
    return power_of_two(n - 1), tl.fma(p * f, f, f)


@triton.jit
def exp(x):
    """e^x, to a relative error of 2e-7; 0 and inf far out, NaN for NaN."""
    half, e = _exp_parts(x)
    result = 2 * tl.fma(half, e, half)
    result = tl.where(x > 88.72284, float("inf"), result)
    return tl.where(x < -87.0, 0.0, result)


@triton.jit
def expm1(x):
    """e^x - 1, to a relative error of 2e-7; -1 and inf far out, NaN for NaN."""
    half, e = _exp_parts(x)
    result = 2 * tl.fma(half, e, half - 0.5)
    result = tl.where(x > 88.72284, float("inf"), result)
    return tl.where(x < -30.0, -1.0, result)


@triton.jit
def log1p_near(x):
    """log(1 + x) for -1/3 <= x <= 1/3 as a float32 and a correction; NaN for NaN.

    Their sum has a relative error of 1e-8; the first alone is log(1 + x) to a few percent.
    """
    d = 2 + x
    s = x / d  # log(1 + x) = 2 artanh(s); what the division loses is added below
    lost = tl.fma(-s, d, x) - s * (x - (d - 2))
    t = s * s
    p = 1.0 / 11
    p = tl.fma(p, t, 1.0 / 9)
    p = tl.fma(p, t, 1.0 / 7)
    p = tl.fma(p, t, 1.0 / 5)
    p = tl.fma(p, t, 1.0 / 3)
    return 2 * s, 2 * tl.fma(p * t, s, lost / d)


@triton.jit
def log2(x):
    """log2 of a normal positive float32, in float64, to 1e-8; NaN for NaN."""
    bits = x.to(tl.int32, bitcast=True)
    mantissa = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    high = mantissa > 4 / 3
    mantissa = tl.where(high, 0.5 * mantissa, mantissa)
    whole = (bits >> 23) - 127 + high.to(tl.int32)
    log, correction = log1p_near(mantissa - 1)
    log = (log.to(tl.float64) + correction.to(tl.float64)) * LOG2E
    return tl.where(x == x, whole.to(tl.float64) + log, float("nan"))


@triton.jit
def capped(x, softcap):
    """softcap * tanh(x / softcap) in float32; csrc/core/softcap.h says how."""
    limit = 9.0 * softcap
    within = tl.abs(x)
    within = tl.where(within > limit, limit, within)  # NaN stays NaN
    t = within * tl.div_rn(1.0, softcap)
    s = t * t
    p = tl.fma(s, 1.3419784e-8, 2.0661231e-5)
    p = tl.fma(tl.fma(tl.fma(p, s, 3.4989945e-3), s, 1.3383979e-1), s, 1.0)
    q = tl.fma(s, 7.8047117e-7, 3.2910355e-4)
    q = tl.fma(tl.fma(tl.fma(q, s, 2.58902e-2), s, 4.67173e-1), s, 1.0)
    y = within * (p / q)
    return tl.where(x < 0, -y, y)


@triton.jit
def capped_target(x, softcap):
    """The same of one number in float64, to 1e-10; beyond 10 softcap to 4e-9."""
    c = softcap.to(tl.float64)
    within = tl.abs(x)
    within = tl.where(within > 10.0 * c, 10.0 * c, within)
    t = within / c
    s = t * t
    p = s * 3.2584062372959645e-11 + 1.0433093704830727e-07
    p = ((p * s + 4.1063718012462206e-05) * s + 0.0043787010891092086) * s
    p = (p + 0.14063694377262803) * s + 1.0
    q = s * 2.7003818103106189e-09 + 2.4921151526638139e-06
    q = ((q * s + 0.00049176660293504134) * s + 0.029035461658902424) * s
    q = (q + 0.47397027620493626) * s + 1.0
    y = within * (p / q)
    return tl.where(x < 0, -y, y)
