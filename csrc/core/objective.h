// The policy objectives, in one place for every C++ and CUDA kernel.
//
// Scalar functions of one token, in float64 on the CPU and on a GPU (docs/decisions.md says why).
// Nothing here knows the vocabulary, tensors or reductions. There are three shapes; a named
// objective (cfpo_kernels/objectives) is a set of numbers for one of them. docs/maths.md derives
// every line; tests/golden holds all languages to one table.
#pragma once

#include <cmath>
#include <utility>

#include "core/host_device.h"

namespace cfpo {

// A term of the loss and what stands for its derivative with respect to the token's
// log-probability: an objective with a stop-gradient in it reports one thing and descends another.
struct Term {
  double loss;
  double dlogp;
};

// One token as the shapes see it. `low` and `high`: what this token has of the objective's bounds,
// by the sign of its advantage.
struct Token {
  double logp;
  double log_ratio;    // logp - old_logp
  double kl_distance;  // ref_logp - logp
  double entropy;
  double advantage;
  double token_weight;  // scales the policy term only
  double weight;        // w_i: mask, reduction and normaliser in one number
  double low, high;
};

// window:    r^power between the bounds, the bound's power outside
// quadratic: r with a penalty on (r - 1)^2 (CFPO)
// sigmoid:   r through a sigmoid (SAPO)
enum class Shape : int { kWindow, kQuadratic, kSigmoid };

// What a window reports as loss; its gradient is always that of the weighted log-probability.
enum class Value : int {
  kSurrogate,  // the weight; a token without gradient reports its bound's (PPO)
  kWeighted,   // the weight; a token without gradient reports 0 (a mask)
  kScore,      // the weight times logp, as trainers print where the weight is detached
};

// An objective. The numbers come in pairs, for A > 0 and for A <= 0.
struct Policy {
  Shape shape;
  // window: bounds on log r. quadratic: `high` is how far from 1 its optimum lies. sigmoid: none.
  double low_positive, low_negative;
  double high_positive, high_negative;
  double drift;  // of drift / 2 log_ratio^2, a pull back to the old policy
  // window: what is left of the gradient below and above the bounds: 0 none, 1 the bound's.
  double below_positive, below_negative;
  double above_positive, above_negative;
  double power_positive, power_negative;  // window: of r. sigmoid: its temperature tau.
  double cap;                             // on log_ratio; quadratic: on |log_ratio|. +inf: none
  double value;                           // a Value; window only

  CFPO_HOST_DEVICE double low(double advantage) const {
    return advantage > 0 ? low_positive : low_negative;
  }
  CFPO_HOST_DEVICE double high(double advantage) const {
    return advantage > 0 ? high_positive : high_negative;
  }

  CFPO_HOST_DEVICE Term operator()(const Token& token) const {
    switch (shape) {
      case Shape::kWindow:
        return window(token);
      case Shape::kQuadratic:
        return quadratic(token);
      default:
        return sigmoid(token);
    }
  }

 private:
  CFPO_HOST_DEVICE Term window(const Token& token) const {
    const bool positive = token.advantage > 0;
    const bool below = token.log_ratio < token.low;
    const bool above = token.log_ratio > token.high;
    // Comparisons, not fmin and fmax, which would swallow a NaN; and before exp, which overflows.
    double x = below ? token.low : above ? token.high : token.log_ratio;
    x = x > cap ? cap : x;
    const double power = positive ? power_positive : power_negative;
    const double weight = power == 0 ? 1.0 : std::exp(power * x);  // 0 * inf is NaN
    double slope = 1;
    if (below) slope = positive ? below_positive : below_negative;
    if (above) slope = positive ? above_positive : above_negative;
    const double gradient = slope == 0 ? 0.0 : slope * weight;
    double reported = gradient;
    if (value == static_cast<int>(Value::kSurrogate) && slope == 0) reported = weight;
    if (value == static_cast<int>(Value::kScore) && gradient != 0) reported *= token.logp;
    return {-token.advantage * reported, -token.advantage * gradient};
  }

  // -(r A - |A| / (2 high) (r - 1)^2); outside the cap the loss is that of the cap.
  CFPO_HOST_DEVICE Term quadratic(const Token& token) const {
    using std::abs, std::copysign, std::expm1;
    const double advantage = token.advantage;
    const bool inside = !(abs(token.log_ratio) > cap);
    const double excess =
        expm1(inside ? token.log_ratio : copysign(cap, token.log_ratio));  // r - 1
    const double slope = abs(advantage) / token.high;
    const double loss = -(advantage + excess * (advantage - 0.5 * slope * excess));
    const double dlogp = -(excess + 1) * (advantage - slope * excess);
    return {loss, inside ? dlogp : 0.0};
  }

  // -4 / tau sigmoid(tau (r - 1)) A, from q = e^-|z|, so that neither tail cancels or overflows.
  CFPO_HOST_DEVICE Term sigmoid(const Token& token) const {
    using std::abs, std::exp, std::expm1;
    const double tau = token.advantage > 0 ? power_positive : power_negative;
    const double x = token.log_ratio > cap ? cap : token.log_ratio;
    const double z = tau * expm1(x), q = exp(-abs(z)), step = -4 * token.advantage;
    const double divisor = 1 / (tau * (1 + q)), share = tau * divisor;
    return {step * (z < 0 ? q : 1.0) * divisor, step * exp(x) * q * share * share};
  }
};

// The numbers of a Policy by the names that Python has for them, in its order.
constexpr std::pair<const char*, double Policy::*> kPolicyNumbers[] = {
    {"low_positive", &Policy::low_positive},
    {"low_negative", &Policy::low_negative},
    {"high_positive", &Policy::high_positive},
    {"high_negative", &Policy::high_negative},
    {"drift", &Policy::drift},
    {"below_positive", &Policy::below_positive},
    {"below_negative", &Policy::below_negative},
    {"above_positive", &Policy::above_positive},
    {"above_negative", &Policy::above_negative},
    {"power_positive", &Policy::power_positive},
    {"power_negative", &Policy::power_negative},
    {"cap", &Policy::cap},
    {"value", &Policy::value},
};

// Schulman's estimators of KL(pi || ref) from one sample, d = ref_logp - logp. Those with a plus
// have the gradient of k2, the one whose expectation is the gradient of the KL divergence.
enum class KlEstimator : int { kK1, kK2, kK3, kK1Plus, kK3Plus };

struct Regularizers {
  KlEstimator kl_estimator;
  bool kl_ratio_weighted;  // times r, differentiated too
  double kl_coef;          // 0: the reference is not looked at
  double entropy_coef;     // 0: entropy is not looked at
};

CFPO_HOST_DEVICE inline Term kl_estimate(KlEstimator estimator, double d) {
  // Not a switch, of which a GPU makes a table of jumps.
  if (estimator == KlEstimator::kK3 || estimator == KlEstimator::kK3Plus) {
    const double excess = std::expm1(d);
    return {excess - d, estimator == KlEstimator::kK3Plus ? -d : -excess};
  }
  return {estimator == KlEstimator::kK2 ? 0.5 * d * d : -d,
          estimator == KlEstimator::kK1 ? 1.0 : -d};
}

CFPO_HOST_DEVICE inline Term kl_term(const Regularizers& reg, double d, double log_ratio) {
  const Term kl = kl_estimate(reg.kl_estimator, d);
  if (!reg.kl_ratio_weighted) return kl;
  const double ratio = std::exp(log_ratio);
  // k3's two exponentials cancel in the sum.
  const double slope = reg.kl_estimator == KlEstimator::kK3 ? -d : kl.loss + kl.dlogp;
  return {ratio * kl.loss, ratio * slope};
}

// The token's weighted loss with its partial derivatives: c = d/dlogp, and h, the factor of
// p_v (log p_v + H) in d/dlogit_v.
struct TokenLoss {
  double loss;
  double dlogp;
  double dentropy_term;
};

// A token whose weight or advantage is 0 has exactly 0 of what they scale, also where r overflows.
CFPO_HOST_DEVICE inline TokenLoss token_loss(const Policy& policy, const Regularizers& reg,
                                             const Token& token) {
  Term total{0, 0};
  if (token.token_weight != 0 && (token.advantage != 0 || policy.drift != 0)) {
    if (token.advantage != 0) total = policy(token);
    if (policy.drift != 0) {
      total.loss += 0.5 * policy.drift * token.log_ratio * token.log_ratio;
      total.dlogp += policy.drift * token.log_ratio;
    }
    total.loss *= token.token_weight;
    total.dlogp *= token.token_weight;
  }
  if (reg.kl_coef != 0) {
    const Term kl = kl_term(reg, token.kl_distance, token.log_ratio);
    total.loss += reg.kl_coef * kl.loss;
    total.dlogp += reg.kl_coef * kl.dlogp;
  }
  if (reg.entropy_coef != 0) total.loss -= reg.entropy_coef * token.entropy;
  return {token.weight * total.loss, token.weight * total.dlogp, token.weight * reg.entropy_coef};
}

}  // namespace cfpo
