#include "cpu/kernels.h"

#include "core/stages.h"
#include "cpu/memory.h"
#include "cpu/row_driver.h"

namespace cfpo::cpu {

namespace {

Sweeps sweeps_for(const Execution& execution, DType dtype) {
  const SegmentOps(&ops)[3] = find_level(execution.level).ops;
  return {ops[static_cast<int>(dtype)], ops[static_cast<int>(DType::kFloat32)]};
}

}  // namespace

std::vector<std::string> supported_levels() {
  std::vector<std::string> names;
  for (const Level* level : levels_here()) names.push_back(level->name);
  return names;
}

void policy_loss(const PolicyLossParams& params, const Execution& execution) {
  const Sweeps sweeps = sweeps_for(execution, params.problem.logits.dtype);
  const PolicyStage stage{params};
  prefer_huge_pages(params.dlogits, params.problem.logits);
  RowDriver<PolicyStage>(sweeps, params.problem, params.dlogits, stage).run(execution.threads);
}

void token_losses(const TokenLossParams& params, const Execution& execution) {
  constexpr std::int64_t kAlone = 4096;  // tokens that are not worth a team: 0.1 ms
  const int threads = ForkGuard::allowed(execution.threads);
#pragma omp parallel num_threads(threads) if (threads > 1 && params.n_tokens > kAlone)
  {
    const DefaultFloatMode mode;
#pragma omp for schedule(static)
    for (std::int64_t row = 0; row < params.n_tokens; ++row) second_stage(params, row);
  }
}

void token_logps(const TokenLogpsParams& params, const Execution& execution) {
  const Sweeps sweeps = sweeps_for(execution, params.problem.logits.dtype);
  const LogpsStage stage{params};
  const Rows no_gradient;
  RowDriver<LogpsStage>(sweeps, params.problem, no_gradient, stage).run(execution.threads);
}

void token_logps_backward(const TokenLogpsBackwardParams& params, const Execution& execution) {
  const Sweeps sweeps = sweeps_for(execution, params.problem.logits.dtype);
  const LogpsBackwardStage stage{params};
  prefer_huge_pages(params.dlogits, params.problem.logits);
  RowDriver<LogpsBackwardStage>(sweeps, params.problem, params.dlogits, stage)
      .run(execution.threads);
}

void multiply_rows(const Rows& rows, const float* factors, std::int64_t factor_stride,
                   const Execution& execution) {
  const SegmentOps& ops = sweeps_for(execution, rows.dtype).ops;
  std::int64_t row = 0;
  while (row < rows.n_rows && factors[row * factor_stride] == 1.0f) ++row;
  if (row == rows.n_rows) return;  // nearly always; not worth a team of threads
  const int threads = ForkGuard::allowed(execution.threads);
  const std::int64_t segments = (rows.n_cols + kSegment - 1) / kSegment;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const DefaultFloatMode mode;
#pragma omp for schedule(static)
    for (std::int64_t k = 0; k < rows.n_rows * segments; ++k) {
      const std::int64_t row = k / segments, begin = k % segments * kSegment;
      const float factor = plain_nan(factors[row * factor_stride]);
      if (factor == 1.0f) continue;
      char* x = static_cast<char*>(rows.row(row)) + begin * dtype_size(rows.dtype);
      ops.multiply(x, std::min(kSegment, rows.n_cols - begin), factor);
    }
  }
}

}  // namespace cfpo::cpu
