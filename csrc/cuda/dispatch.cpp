// Storage types become template arguments.
#include <stdexcept>

#include "cuda/launch.h"
#include "cuda/plan.h"
#include "cuda/run.h"

namespace cfpo::cuda {

namespace {

constexpr std::int64_t kMostRows = std::int64_t{1} << 30;
constexpr std::int64_t kMostColumns = kMostRows;

template <class T>
struct Type {
  using type = T;
};

template <class Run>
void with_dtype(const Rows& rows, Run run) {
  // Within a row and among rows the kernels count by int; offsets are 64-bit.
  if (rows.n_cols > kMostColumns || rows.n_rows > kMostRows) {
    throw std::invalid_argument("the CUDA kernels take at most 2^30 rows and 2^30 columns");
  }
  switch (rows.dtype) {
    case DType::kFloat32:
      return run(Type<float>());
    case DType::kBFloat16:
      return run(Type<bfloat16>());
    case DType::kFloat16:
      return run(Type<float16>());
  }
  throw std::invalid_argument("unknown dtype");
}

template <class Stage>
void run(const Stage& stage, const Rows& dlogits, const Execution& execution) {
  with_dtype(stage.p.problem.logits, [&](auto type) {
    run_stage<typename decltype(type)::type>(stage, dlogits, execution);
  });
}

// The same for logits that may be behind a softcap.
template <class Stage>
void run_capped(const Stage& stage, const Rows& dlogits, const Execution& execution) {
  if (stage.p.problem.softcap.cap == 0.0f) return run(stage, dlogits, execution);
  run(Capped<Stage>{stage}, dlogits, execution);
}

}  // namespace

std::int64_t workspace_bytes(const Rows& logits, int device) {
  const int n_segments = count_segments(logits.n_cols, logits.dtype);
  const bool split = split_rows(logits.n_rows, n_segments, device_limits(device));
  return split ? SplitWorkspace::bytes(logits.n_rows, n_segments) : 0;
}

void policy_loss(const PolicyLossParams& params, const Execution& execution) {
  run_capped(PolicyStage{params}, params.dlogits, execution);
}

void token_logps(const TokenLogpsParams& params, const Execution& execution) {
  run_capped(LogpsStage{params}, Rows(), execution);
}

void token_logps_backward(const TokenLogpsBackwardParams& params, const Execution& execution) {
  run_capped(LogpsBackwardStage{params}, params.dlogits, execution);
}

void multiply_rows(const Rows& rows, const float* factors, std::int64_t factor_stride,
                   const Execution& execution) {
  with_dtype(rows, [&](auto type) {
    run_multiply<typename decltype(type)::type>(rows, factors, factor_stride, execution);
  });
}

}  // namespace cfpo::cuda
