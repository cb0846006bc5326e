"""The policy objectives, in one place for every Triton kernel.

Scalar functions of one token; nothing here knows the vocabulary, pointers or reductions. There are
three shapes; a named objective (cfpo_kernels.objectives) is a set of numbers for one of them. A
kernel takes its shape and its KL estimator as constexpr functions. docs/maths.md derives every
line; tests/golden holds all languages to one table.
"""

import triton
import triton.language as tl

from .scalar_math import exp, expm1

# Each shape: (logp, log_ratio, advantage, low, high, p0 ... p7) -> (loss, what stands for its
# derivative by logp). low and high are this token's, by the sign of A; p0 ... p7 are the numbers of
# cfpo_kernels.shapes.Shape from below_positive on, in their order.


@triton.jit
def window(
    logp,
    log_ratio,
    advantage,
    low,
    high,
    below_positive,
    below_negative,
    above_positive,
    above_negative,
    power_positive,
    power_negative,
    cap,
    value,
):
    """r^power between the bounds, the bound's power outside; csrc/core/objective.h has the rest."""
    positive = advantage > 0
    below = log_ratio < low
    above = log_ratio > high
    # Comparisons, not minimum and maximum, which would swallow a NaN; and before exp.
    x = tl.where(below, low, tl.where(above, high, log_ratio))
    x = tl.where(x > cap, cap, x)
    power = tl.where(positive, power_positive, power_negative)
    weight = tl.where(power == 0, 1.0, exp(tl.where(power == 0, 0.0, power * x)))
    kept_below = tl.where(positive, below_positive, below_negative)
    kept_above = tl.where(positive, above_positive, above_negative)
    slope = tl.where(above, kept_above, tl.where(below, kept_below, 1.0))
    gradient = tl.where(slope == 0, 0.0, slope * weight)
    surrogate = tl.where(slope == 0, weight, gradient)
    score = tl.where(gradient == 0, 0.0, gradient * logp)
    reported = tl.where(value == 0, surrogate, tl.where(value == 1, gradient, score))
    return -advantage * reported, -advantage * gradient


@triton.jit
def quadratic(
    logp,
    log_ratio,
    advantage,
    low,
    high,
    _below_positive,
    _below_negative,
    _above_positive,
    _above_negative,
    _power_positive,
    _power_negative,
    cap,
    _value,
):
    """-(r A - |A| / (2 high) (r - 1)^2); no gradient outside the cap on |log r|."""
    outside = tl.abs(log_ratio) > cap
    capped = tl.where(log_ratio > 0, cap, -cap)
    excess = expm1(tl.where(outside, capped, log_ratio))  # r - 1
    slope = tl.abs(advantage) / high
    loss = -(advantage + excess * (advantage - 0.5 * slope * excess))
    dlogp = -(excess + 1) * (advantage - slope * excess)
    return loss, tl.where(outside, 0.0, dlogp)


@triton.jit
def sigmoid(
    logp,
    log_ratio,
    advantage,
    low,
    high,
    _below_positive,
    _below_negative,
    _above_positive,
    _above_negative,
    tau_positive,
    tau_negative,
    cap,
    _value,
):
    """-4 / tau sigmoid(tau (r - 1)) A, from q = e^-|z|: neither tail cancels or overflows."""
    tau = tl.where(advantage > 0, tau_positive, tau_negative)
    x = tl.where(log_ratio > cap, cap, log_ratio)
    z = tau * expm1(x)
    q = exp(-tl.abs(z))
    gate = tl.where(z < 0, q, 1.0) / (1 + q)
    dlogp = -4 * exp(x) * q / ((1 + q) * (1 + q)) * advantage
    return -4 / tau * gate * advantage, dlogp


# Each estimator of KL(pi || ref): d = ref_logp - logp -> (KL, d KL / d logp, their sum). Those with
# a plus have the gradient of k2. The sum is what a factor of r leaves as derivative, over r; in
# k3's the two exponentials cancel.


@triton.jit
def k1(d):
    return -d, 1.0, 1 - d


@triton.jit
def k1_plus(d):
    return -d, -d, -2 * d


@triton.jit
def k2(d):
    return 0.5 * d * d, -d, 0.5 * d * d - d


@triton.jit
def k3(d):
    excess = expm1(d)
    return excess - d, -excess, -d


@triton.jit
def k3_plus(d):
    excess = expm1(d)
    return excess - d, -d, excess - 2 * d


@triton.jit
def kl_term(d, log_ratio, KL: tl.constexpr, RATIO_WEIGHTED: tl.constexpr):
    """The estimate, times r if RATIO_WEIGHTED, and its derivative."""
    kl, dkl, both = KL(d)
    if RATIO_WEIGHTED:
        ratio = exp(log_ratio)
        kl *= ratio
        dkl = ratio * both
    return kl, dkl


@triton.jit
def token_loss(
    logp,
    log_ratio,
    kl_distance,
    entropy,
    advantage,
    token_weight,
    weight,
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
    OBJECTIVE: tl.constexpr,
    KL: tl.constexpr,
    KL_RATIO_WEIGHTED: tl.constexpr,
):
    """The token's weighted loss, c = d loss / d logp, and h, the factor of p_v (log p_v + H).

    A token whose weight or advantage is 0 has exactly 0 of what they scale, also where r overflows.
    KL: an estimator, or None where kl_coef is 0.
    """
    loss, dlogp = OBJECTIVE(logp, log_ratio, advantage, low, high, p0, p1, p2, p3, p4, p5, p6, p7)
    loss = tl.where(advantage != 0, loss, 0.0) + tl.where(
        drift != 0, 0.5 * drift * log_ratio * log_ratio, 0.0
    )
    dlogp = tl.where(advantage != 0, dlogp, 0.0) + tl.where(drift != 0, drift * log_ratio, 0.0)
    counts = (token_weight != 0) & ((advantage != 0) | (drift != 0))
    loss = tl.where(counts, token_weight * loss, 0.0)
    dlogp = tl.where(counts, token_weight * dlogp, 0.0)
    if KL is not None:
        kl, dkl = kl_term(kl_distance, log_ratio, KL, KL_RATIO_WEIGHTED)
        loss += kl_coef * kl
        dlogp += kl_coef * dkl
    loss -= tl.where(entropy_coef != 0, entropy_coef * entropy, 0.0)
    return weight * loss, weight * dlogp, weight * entropy_coef


# By the names that cfpo_kernels.objectives and cfpo_kernels.validation give them.
OBJECTIVES = {"window": window, "quadratic": quadratic, "sigmoid": sigmoid}
KL_ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3, "k1+": k1_plus, "k3+": k3_plus}
