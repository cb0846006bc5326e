"""The policy objectives, in one place for every Triton kernel.

Scalar functions of one token; nothing here knows the vocabulary, pointers or reductions. A kernel
takes its objective and its KL estimator as constexpr functions. docs/design.md derives every line;
tests/golden holds all languages to one table.
"""

import triton
import triton.language as tl

from .scalar_math import expm1

# Each objective: (log_ratio, advantage, parameters...) -> (loss, d loss / d logp). The parameters
# are those of cfpo_kernels.objectives in their order, padded to three; inf stands for None.


@triton.jit
def cfpo(log_ratio, advantage, epsilon, log_ratio_clip, _unused):
    """-(r A - |A| / (2 eps) (r - 1)^2), arXiv 2601.22801; no gradient outside the clamp."""
    outside = tl.abs(log_ratio) > log_ratio_clip
    clamped = tl.where(log_ratio > 0, log_ratio_clip, -log_ratio_clip)
    excess = expm1(tl.where(outside, clamped, log_ratio))  # r - 1
    slope = tl.abs(advantage) / epsilon
    loss = -(advantage + excess * (advantage - 0.5 * slope * excess))
    dlogp = -(excess + 1) * (advantage - slope * excess)
    return loss, tl.where(outside, 0.0, dlogp)


@triton.jit
def ppo_clip(log_ratio, advantage, epsilon_low, epsilon_high, dual_clip):
    """-min(r A, clip(r) A), and for A < 0 at most -dual_clip A. On a boundary r is not clipped."""
    excess = expm1(log_ratio)
    ratio = excess + 1
    high = (advantage > 0) & (excess > epsilon_high)
    low = (advantage < 0) & (excess < -epsilon_low)
    dual = (advantage < 0) & (ratio > dual_clip)
    bound = tl.where(high, 1 + epsilon_high, tl.where(low, 1 - epsilon_low, dual_clip))
    clipped = high | low | dual
    loss = -tl.where(clipped, bound, ratio) * advantage
    return loss, tl.where(clipped, 0.0, -ratio * advantage)


# Each estimator of KL(pi || ref): d = ref_logp - logp -> (KL, d KL / d logp).


@triton.jit
def k1(d):
    return -d, 1.0


@triton.jit
def k2(d):
    return 0.5 * d * d, -d


@triton.jit
def k3(d):
    excess = expm1(d)
    return excess - d, -excess


@triton.jit
def token_loss(
    log_ratio,
    kl_distance,
    entropy,
    advantage,
    policy_weight,
    weight,
    p0,
    p1,
    p2,
    kl_coef,
    entropy_coef,
    OBJECTIVE: tl.constexpr,
    KL: tl.constexpr,
):
    """The token's weighted loss, c = d loss / d logp, and h, the factor of p_v (log p_v + H).

    KL: an estimator, or None where kl_coef is 0.
    """
    loss, dlogp = OBJECTIVE(log_ratio, advantage, p0, p1, p2)
    # A == 0 is exactly 0, also where r overflows.
    active = advantage != 0
    loss = tl.where(active, policy_weight * loss, 0.0)
    dlogp = tl.where(active, policy_weight * dlogp, 0.0)
    if KL is not None:
        kl, dkl = KL(kl_distance)
        loss += kl_coef * kl
        dlogp += kl_coef * dkl
    loss -= tl.where(entropy_coef != 0, entropy_coef * entropy, 0.0)
    return weight * loss, weight * dlogp, weight * entropy_coef


# By the names that cfpo_kernels.objectives and cfpo_kernels.validation give them.
OBJECTIVES = {"cfpo": cfpo, "ppo_clip": ppo_clip}
KL_ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}
