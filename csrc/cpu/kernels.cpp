#include "cpu/kernels.h"

#include "cpu/huge_pages.h"
#include "cpu/row_driver.h"

namespace cfpo::cpu {

namespace {

const SegmentOps& ops_for(const Execution& execution, DType dtype) {
  return find_level(execution.level).ops[static_cast<int>(dtype)];
}

template <class Policy>
struct PolicyStage {
  const PolicyLossParams& p;
  const Policy& policy;

  bool skip(std::int64_t row) const { return p.problem.weights[row] == 0.0f; }
  bool entropy() const { return p.entropy != nullptr || p.regularizers.entropy_coef != 0.0; }

  void skipped(std::int64_t row) const {
    p.loss[row] = p.logps[row] = 0.0f;
    if (p.entropy != nullptr) p.entropy[row] = 0.0f;
  }

  // From the unrounded log p: rounding it to float32 would cost 5e-7 |A| / eps of the gradient.
  // But scoring these very logits gives exactly `logp`, and must give exactly r = 1.
  double log_ratio(std::int64_t row, double exact_logp, float logp) const {
    const bool on_policy = p.old_logps == nullptr || p.old_logps[row] == logp;
    return exact_logp -
           (on_policy ? exact_logp : p.old_logps[row]);  // NaN where logp is not finite
  }

  RowGradient operator()(std::int64_t row, const RowStats& stats) const {
    const float logp = static_cast<float>(stats.logp);
    Token<double> token;
    token.log_ratio = log_ratio(row, stats.logp, logp);
    token.kl_distance = p.ref_logps != nullptr ? p.ref_logps[row] - stats.logp : 0.0;
    token.entropy = stats.entropy;
    token.advantage = p.advantages[row];
    token.policy_weight = p.token_weights != nullptr ? p.token_weights[row] : 1.0;
    token.weight = p.problem.weights[row];
    const TokenLoss<double> loss = token_loss(policy, p.regularizers, token);
    p.loss[row] = static_cast<float>(loss.loss);
    p.logps[row] = logp;
    if (p.entropy != nullptr) p.entropy[row] = static_cast<float>(stats.entropy);
    return row_gradient(stats, p.grad_scale * loss.dlogp, p.grad_scale * loss.dentropy_term);
  }
};

struct LogpsStage {
  const TokenLogpsParams& p;

  bool skip(std::int64_t row) const { return p.problem.weights[row] == 0.0f; }
  bool entropy() const { return p.entropy != nullptr; }

  void skipped(std::int64_t row) const {
    p.logps[row] = 0.0f;
    p.lse[row] = 0.0;
    if (p.entropy != nullptr) p.entropy[row] = 0.0f;
  }

  RowGradient operator()(std::int64_t row, const RowStats& stats) const {
    p.logps[row] = static_cast<float>(stats.logp);
    p.lse[row] = stats.lse();
    if (p.entropy != nullptr) p.entropy[row] = static_cast<float>(stats.entropy);
    return {};
  }
};

struct LogpsBackwardStage {
  const TokenLogpsBackwardParams& p;
  const SegmentOps& ops;

  float dlogp(std::int64_t row) const { return p.dlogps != nullptr ? p.dlogps[row] : 0.0f; }
  float dentropy(std::int64_t row) const { return p.dentropy != nullptr ? p.dentropy[row] : 0.0f; }
  bool skip(std::int64_t row) const {
    return p.problem.weights[row] == 0.0f || (dlogp(row) == 0.0f && dentropy(row) == 0.0f);
  }
  bool entropy() const { return false; }
  void skipped(std::int64_t) const {}

  RowStats stats(std::int64_t row) const {
    const float target = ops.load(p.problem.logits.row(row), p.problem.token_ids[row]);
    const double entropy = p.entropy != nullptr ? p.entropy[row] : 0.0;
    return stats_from_lse(row_scale(p.problem, row), target, p.lse[row], entropy);
  }

  // dH/dlogit_v = -p_v (log p_v + H): the negative of what an entropy bonus brings to a loss.
  RowGradient operator()(std::int64_t row, const RowStats& stats) const {
    return row_gradient(stats, dlogp(row), -dentropy(row));
  }
};

}  // namespace

std::vector<std::string> supported_levels() {
  std::vector<std::string> names;
  for (const Level* level : levels_here()) names.push_back(level->name);
  return names;
}

template <class Policy>
void policy_loss(const PolicyLossParams& params, const Policy& policy, const Execution& execution) {
  const SegmentOps& ops = ops_for(execution, params.problem.logits.dtype);
  const PolicyStage<Policy> stage{params, policy};
  prefer_huge_pages(params.dlogits, params.problem.logits);
  RowDriver<true, PolicyStage<Policy>>(ops, params.problem, params.dlogits, stage)
      .run(execution.threads);
}
template void policy_loss(const PolicyLossParams&, const Cfpo<double>&, const Execution&);
template void policy_loss(const PolicyLossParams&, const PpoClip<double>&, const Execution&);

void token_logps(const TokenLogpsParams& params, const Execution& execution) {
  const SegmentOps& ops = ops_for(execution, params.problem.logits.dtype);
  const LogpsStage stage{params};
  const Rows no_gradient;
  RowDriver<true, LogpsStage>(ops, params.problem, no_gradient, stage).run(execution.threads);
}

void token_logps_backward(const TokenLogpsBackwardParams& params, const Execution& execution) {
  const SegmentOps& ops = ops_for(execution, params.problem.logits.dtype);
  const LogpsBackwardStage stage{params, ops};
  prefer_huge_pages(params.dlogits, params.problem.logits);
  RowDriver<false, LogpsBackwardStage>(ops, params.problem, params.dlogits, stage)
      .run(execution.threads);
}

void multiply_rows(const Rows& rows, const float* factors, std::int64_t factor_stride,
                   const Execution& execution) {
  const SegmentOps& ops = ops_for(execution, rows.dtype);
  const int threads = ForkGuard::allowed(execution.threads);
  const std::int64_t segments = (rows.n_cols + kSegment - 1) / kSegment;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (std::int64_t k = 0; k < rows.n_rows * segments; ++k) {
    const std::int64_t row = k / segments, begin = k % segments * kSegment;
    const float factor = plain_nan(factors[row * factor_stride]);
    if (factor == 1.0f) continue;
    char* x = static_cast<char*>(rows.row(row)) + begin * dtype_size(rows.dtype);
    ops.multiply(x, std::min(kSegment, rows.n_cols - begin), factor);
  }
}

}  // namespace cfpo::cpu
