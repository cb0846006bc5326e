// The policy objectives, in one place for every C++ and CUDA kernel.
//
// Scalar functions of one token; nothing here knows the vocabulary, tensors or reductions. `Real`
// is double on the CPU, where a token's scalars cost nothing beside its row, and float on a GPU.
// docs/design.md derives every line; tests/golden holds all languages to one table.
#pragma once

#include <cmath>

#include "core/host_device.h"

namespace cfpo {

// A term of the loss and its derivative with respect to the token's log-probability.
template <class Real>
struct Term {
  Real loss;
  Real dlogp;
};

// CFPO (arXiv 2601.22801): -(r A - |A| / (2 eps) (r - 1)^2), the penalty of SPO (2401.16025).
// The log-ratio may be clamped against overflow; outside the clamp the gradient is zero.
template <class Real>
struct Cfpo {
  Real epsilon;
  Real log_ratio_clip;  // +inf: none

  CFPO_HOST_DEVICE Term<Real> operator()(Real log_ratio, Real advantage) const {
    using std::abs, std::copysign, std::expm1;
    const bool inside = !(abs(log_ratio) > log_ratio_clip);
    const Real clamped = inside ? log_ratio : copysign(log_ratio_clip, log_ratio);
    const Real excess = expm1(clamped);  // r - 1
    const Real slope = abs(advantage) / epsilon;
    const Real loss = -(advantage + excess * (advantage - Real(0.5) * slope * excess));
    const Real dlogp = -(excess + 1) * (advantage - slope * excess);
    return {loss, inside ? dlogp : Real(0)};
  }
};

// PPO's clipped surrogate, -min(r A, clip(r) A), with the optional dual clip of arXiv 1912.09729
// for A < 0. On a boundary the unclipped branch counts.
template <class Real>
struct PpoClip {
  Real epsilon_low;
  Real epsilon_high;
  Real dual_clip;  // +inf: none

  CFPO_HOST_DEVICE Term<Real> operator()(Real log_ratio, Real advantage) const {
    const Real excess = std::expm1(log_ratio);
    const Real ratio = excess + 1;
    if (advantage > 0 && excess > epsilon_high) return {-(1 + epsilon_high) * advantage, Real(0)};
    if (advantage < 0 && excess < -epsilon_low) return {-(1 - epsilon_low) * advantage, Real(0)};
    if (advantage < 0 && ratio > dual_clip) return {-dual_clip * advantage, Real(0)};
    return {-ratio * advantage, -ratio * advantage};
  }
};

// Schulman's estimators of KL(pi || ref) from one sample, d = ref_logp - logp.
enum class KlEstimator : int { kK1 = 1, kK2 = 2, kK3 = 3 };

template <class Real>
CFPO_HOST_DEVICE Term<Real> kl_term(KlEstimator estimator, Real d) {
  switch (estimator) {
    case KlEstimator::kK1:
      return {-d, Real(1)};
    case KlEstimator::kK2:
      return {Real(0.5) * d * d, -d};
    default: {
      const Real excess = std::expm1(d);
      return {excess - d, -excess};
    }
  }
}

struct Regularizers {
  KlEstimator kl_estimator;
  double kl_coef;       // 0: the reference is not looked at
  double entropy_coef;  // 0: entropy is not looked at
};

// One token. `log_ratio` = logp - old_logp; `kl_distance` = ref_logp - logp.
template <class Real>
struct Token {
  Real log_ratio;
  Real kl_distance;
  Real entropy;
  Real advantage;
  Real policy_weight;  // token_weights: scales the policy term only
  Real weight;         // w_i: mask, reduction and normaliser in one number
};

// The token's weighted loss with its partial derivatives: c = d/dlogp, and h, the factor of
// p_v (log p_v + H) in d/dlogit_v.
template <class Real>
struct TokenLoss {
  Real loss;
  Real dlogp;
  Real dentropy_term;
};

template <class Policy, class Real>
CFPO_HOST_DEVICE TokenLoss<Real> token_loss(const Policy& policy, const Regularizers& reg,
                                            const Token<Real>& token) {
  Term<Real> total{0, 0};
  if (token.advantage != 0) {  // A == 0 is exactly 0, also where r overflows
    const Term<Real> term = policy(token.log_ratio, token.advantage);
    total = {token.policy_weight * term.loss, token.policy_weight * term.dlogp};
  }
  if (reg.kl_coef != 0) {
    const Term<Real> kl = kl_term(reg.kl_estimator, token.kl_distance);
    total.loss += Real(reg.kl_coef) * kl.loss;
    total.dlogp += Real(reg.kl_coef) * kl.dlogp;
  }
  if (reg.entropy_coef != 0) total.loss -= Real(reg.entropy_coef) * token.entropy;
  return {token.weight * total.loss, token.weight * total.dlogp,
          token.weight * Real(reg.entropy_coef)};
}

}  // namespace cfpo
