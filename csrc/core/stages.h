// Stage 2: what happens to a row between its sums and its gradient, for the CPU and the GPU.
//
// A stage provides
//   bool skip(row)                  the row is not read and its gradient is zeros
//   void skipped(row)               sets the scalar outputs of such a row
//   RowDerivatives derivatives(row, stats, publish)
//                                   `publish`: store the row's scalar outputs
//   RowGradient operator()(row, stats, publish)   the same as coefficients
//   kSums                           stage 1 has to sum the row; if not, RowStats stats(row, target)
//                                   and may_peak, peak, least_peak and peak_gradient
//   kGradient                       whether a gradient can be wanted
//   bool entropy()                  the sums must include the one for the entropy
// It is trivially copyable, because a GPU kernel takes it as an argument. The scalars are float64
// on a GPU too: see "Float64 for a row's scalars" in docs/decisions.md.
#pragma once

#include "core/row_math.h"

namespace cfpo {

// What a token brings beside its log p; 0, or a weight of 1, where it brings nothing.
struct TokenNumbers {
  float advantage, old_logp, ref_logp, token_weight, low, high, weight;
};

CFPO_HOST_DEVICE inline TokenNumbers load_token(const TokenColumns& columns, const float* weights,
                                                std::int64_t row) {
  const float advantage = columns.advantages[row];
  return {advantage,
          columns.old_logps != nullptr ? columns.old_logps[row] : 0.0f,
          columns.ref_logps != nullptr ? columns.ref_logps[row] : 0.0f,
          columns.token_weights != nullptr ? columns.token_weights[row] : 1.0f,
          columns.low != nullptr ? columns.low[row] : 0.0f,
          columns.high != nullptr ? columns.high[row] : 0.0f,
          weights[row]};
}

// log r is from the unrounded log p: rounding it to float32 would cost 5e-7 |A| / eps of the
// gradient. But scoring these very logits gives exactly `rounded`, and must give exactly r = 1.
CFPO_HOST_DEVICE inline Token make_token(const TokenColumns& columns, const Policy& policy,
                                         const TokenNumbers& in, double logp, float rounded,
                                         double entropy) {
  const bool on_policy = columns.old_logps == nullptr || in.old_logp == rounded;
  Token token;
  token.logp = logp;
  token.log_ratio = logp - (on_policy ? logp : in.old_logp);  // NaN where logp is not finite
  token.kl_distance = columns.ref_logps != nullptr ? in.ref_logp - logp : 0.0;
  token.entropy = entropy;
  token.advantage = in.advantage;
  token.token_weight = in.token_weight;
  token.weight = in.weight;
  token.low = columns.low != nullptr ? in.low : policy.low(in.advantage);
  token.high = columns.high != nullptr ? in.high : policy.high(in.advantage);
  return token;
}

struct PolicyStage {
  static constexpr bool kSums = true;
  static constexpr bool kGradient = true;
  PolicyLossParams p;

  CFPO_HOST_DEVICE bool skip(std::int64_t row) const { return p.problem.weights[row] == 0.0f; }
  CFPO_HOST_DEVICE bool entropy() const {
    return p.entropy != nullptr || p.regularizers.entropy_coef != 0.0;
  }

  CFPO_HOST_DEVICE void skipped(std::int64_t row) const {
    p.loss[row] = p.logps[row] = 0.0f;
    if (p.entropy != nullptr) p.entropy[row] = 0.0f;
  }

  // Loaded early by a kernel that has something else to wait for.
  struct Inputs : TokenNumbers {
    float grad_scale;
  };
  CFPO_HOST_DEVICE Inputs inputs(std::int64_t row) const {
    return {load_token(p.columns, p.problem.weights, row),
            p.grad_scale != nullptr ? *p.grad_scale : 1.0f};
  }

  CFPO_HOST_DEVICE RowDerivatives derivatives(std::int64_t row, const Inputs& in,
                                              const RowStats& stats, bool publish) const {
    const float logp = static_cast<float>(stats.logp);
    const Token token = make_token(p.columns, p.policy, in, stats.logp, logp, stats.entropy);
    const TokenLoss loss = token_loss(p.policy, p.regularizers, token);
    if (publish) {
      p.loss[row] = static_cast<float>(loss.loss);
      p.logps[row] = logp;
      if (p.entropy != nullptr) p.entropy[row] = static_cast<float>(stats.entropy);
    }
    const double scale = in.grad_scale;
    return {scale * loss.dlogp, scale * loss.dentropy_term};
  }
  CFPO_HOST_DEVICE RowDerivatives derivatives(std::int64_t row, const RowStats& stats,
                                              bool publish = true) const {
    return derivatives(row, inputs(row), stats, publish);
  }
  CFPO_HOST_DEVICE RowGradient operator()(std::int64_t row, const Inputs& in, const RowStats& stats,
                                          bool publish) const {
    return row_gradient(stats, derivatives(row, in, stats, publish));
  }
  CFPO_HOST_DEVICE RowGradient operator()(std::int64_t row, const RowStats& stats,
                                          bool publish = true) const {
    return (*this)(row, inputs(row), stats, publish);
  }
};

// Stage 2 of a token without its row.
CFPO_HOST_DEVICE inline void second_stage(const TokenLossParams& p, std::int64_t row) {
  p.dlogps[row] = 0.0;
  if (p.dlog_ratios != nullptr) p.dlog_ratios[row] = 0.0;
  p.loss[row] = 0.0f;
  const TokenNumbers in = load_token(p.columns, p.weights, row);
  if (in.weight == 0.0f) return;
  const double logp = p.logps[row], entropy = p.entropy != nullptr ? p.entropy[row] : 0.0;
  Token token = make_token(p.columns, p.policy, in, logp, static_cast<float>(logp), entropy);
  if (p.log_ratios != nullptr) token.log_ratio = p.log_ratios[row];
  const TokenLoss loss = token_loss(p.policy, p.regularizers, token);
  p.loss[row] = static_cast<float>(loss.loss);
  p.dlogps[row] = loss.dlogp;
  if (p.log_ratios == nullptr) return;
  const SharedRatioSlopes slopes = shared_ratio_slopes(p.policy, p.regularizers, token);
  p.dlogps[row] = slopes.dlogp;
  p.dlog_ratios[row] = slopes.dlog_ratio;
}

struct LogpsStage {
  static constexpr bool kSums = true;
  static constexpr bool kGradient = false;
  TokenLogpsParams p;

  CFPO_HOST_DEVICE bool skip(std::int64_t row) const { return p.problem.weights[row] == 0.0f; }
  CFPO_HOST_DEVICE bool entropy() const { return p.entropy != nullptr; }

  CFPO_HOST_DEVICE void skipped(std::int64_t row) const {
    p.logps[row] = 0.0;
    p.lse[row] = {};
    if (p.entropy != nullptr) p.entropy[row] = 0.0f;
  }

  CFPO_HOST_DEVICE RowDerivatives derivatives(std::int64_t row, const RowStats& stats,
                                              bool publish = true) const {
    if (publish) {
      p.logps[row] = stats.logp;
      p.lse[row] = stats.lse();
      if (p.entropy != nullptr) p.entropy[row] = static_cast<float>(stats.entropy);
    }
    return {};
  }
  CFPO_HOST_DEVICE RowGradient operator()(std::int64_t row, const RowStats& stats,
                                          bool publish = true) const {
    derivatives(row, stats, publish);
    return {};
  }
};

struct LogpsBackwardStage {
  static constexpr bool kSums = false;
  static constexpr bool kGradient = true;
  TokenLogpsBackwardParams p;

  CFPO_HOST_DEVICE float dlogp(std::int64_t row) const {
    return p.dlogps != nullptr ? p.dlogps[row] : 0.0f;
  }
  CFPO_HOST_DEVICE float dentropy(std::int64_t row) const {
    return p.dentropy != nullptr ? p.dentropy[row] : 0.0f;
  }
  CFPO_HOST_DEVICE bool skip(std::int64_t row) const {
    return p.problem.weights[row] == 0.0f || (dlogp(row) == 0.0f && dentropy(row) == 0.0f);
  }
  CFPO_HOST_DEVICE bool entropy() const { return false; }
  CFPO_HOST_DEVICE void skipped(std::int64_t) const {}

  template <class Logit>
  CFPO_HOST_DEVICE RowStats stats(std::int64_t row, Logit target) const {
    const double entropy = p.entropy != nullptr ? p.entropy[row] : 0.0;
    return stats_from_lse(row_scale(p.problem, row), target, p.lse[row], entropy);
  }

  // dH/dlogit_v = -p_v (log p_v + H): the negative of what an entropy bonus brings to a loss.
  CFPO_HOST_DEVICE RowDerivatives derivatives(std::int64_t row, const RowStats&,
                                              bool = true) const {
    return {dlogp(row), -dentropy(row)};
  }
  CFPO_HOST_DEVICE RowGradient operator()(std::int64_t row, const RowStats& stats,
                                          bool = true) const {
    return row_gradient(stats, derivatives(row, stats));
  }
  // Whether an element beside the target may have so much of the row's mass that its part of the
  // entropy's gradient, p (log p + H), has to be computed by itself.
  CFPO_HOST_DEVICE bool may_peak(std::int64_t row) const {
    return dentropy(row) != 0.0f && p.entropy[row] < kPeakedEntropy;
  }
  // Whether that is one with this logit.
  CFPO_HOST_DEVICE Peak peak(std::int64_t row, float logit, std::int64_t at) const {
    return peak_from_lse(row_scale(p.problem, row), logit, p.lse[row], p.entropy[row], at);
  }
  // No less than this, roughly.
  CFPO_HOST_DEVICE float least_peak(std::int64_t row) const {
    return static_cast<float>(p.lse[row].total() - 1.0 / row_scale(p.problem, row));
  }
  CFPO_HOST_DEVICE float peak_gradient(std::int64_t row, const Peak& peak) const {
    return cfpo::peak_gradient(row_scale(p.problem, row), peak, derivatives(row, {}));
  }
};

}  // namespace cfpo
