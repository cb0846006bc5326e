// What a kernel is told: plain pointers and numbers, the same for the CPU and the GPU.
//
// N rows (tokens) of V columns (vocabulary). Per-row arrays are contiguous, of length N, and may
// be null where the comment says so. Rows with weight 0 are never read.
#pragma once

#include <cmath>
#include <cstdint>
#include <utility>

#include "core/dtype.h"
#include "core/objective.h"
#include "core/row_types.h"
#include "core/softcap.h"

namespace cfpo {

// N rows whose starts need not be evenly spaced: row i = (i / inner, i % inner), as in a slice
// (B, T - 1, V) of (B, T, V). Strides in elements; the last dimension has stride 1.
struct Rows {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  std::int64_t n_rows = 0;
  std::int64_t n_cols = 0;
  std::int64_t inner = 1;
  std::int64_t outer_stride = 0;
  std::int64_t inner_stride = 0;

  // GPUs have no 64-bit division: there `i` is an int.
  template <class Index>
  CFPO_HOST_DEVICE void* row(Index i) const {
    const Index size = static_cast<Index>(inner);
    const std::int64_t element = i / size * outer_stride + i % size * inner_stride;
    return static_cast<char*>(data) + element * dtype_size(dtype);
  }
};

// The rows a kernel reads, and the scalar that turns each into probabilities.
struct Problem {
  Rows logits;                      // (N, V)
  const std::int64_t* token_ids;    // (N)
  const float* temperature;         // (N) or one for all
  std::int64_t temperature_stride;  // 1 or 0
  const float* weights;             // (N), 0: not part of the loss
  // The rows are some columns of longer ones, and a token outside [0, V) is among the others. If
  // not, such a token makes its row NaN.
  bool sharded = false;
  // What the logits go through before anything else; gradients are those of what is there.
  Softcap softcap;

  // The row's token, or -1 where it is none of its columns.
  template <class Index>
  CFPO_HOST_DEVICE std::int64_t column(Index row) const {
    const std::int64_t token = token_ids[row];
    return token >= 0 && token < logits.n_cols ? token : -1;
  }
  // What stands for the logit of a token that is none of the columns.
  CFPO_HOST_DEVICE float absent_logit() const { return sharded ? -INFINITY : NAN; }
};

// What a token brings to a policy loss beside its row; each (N).
struct TokenColumns {
  const float* advantages;
  const float* old_logps;      // null: on-policy
  const float* token_weights;  // null: 1
  const float* ref_logps;      // may be null where kl_coef is 0
  const float* low;            // null: the objective's own; likewise `high`
  const float* high;
};

// By the names that Python has for them, in its order (cfpo_kernels/inputs.py).
constexpr std::pair<const char*, const float* TokenColumns::*> kTokenColumns[] = {
    {"advantages", &TokenColumns::advantages},
    {"old_logps", &TokenColumns::old_logps},
    {"token_weights", &TokenColumns::token_weights},
    {"ref_logps", &TokenColumns::ref_logps},
    {"low", &TokenColumns::low},
    {"high", &TokenColumns::high},
};

struct PolicyLossParams {
  Problem problem;
  Rows dlogits;  // (N, V), may be the logits; data null: no gradient
  TokenColumns columns;
  Policy policy;
  Regularizers regularizers;
  const float* grad_scale;  // one for all; multiplies the gradient before it is rounded; null: 1
  float* loss;              // (N), weighted
  float* logps;             // (N)
  float* entropy;           // (N), may be null
};

// Stage 2 alone, for log-probs that exist: of shards, of sequences, from elsewhere.
struct TokenLossParams {
  std::int64_t n_tokens;
  const double* logps;       // (N)
  const float* entropy;      // (N), may be null where entropy_coef is 0
  const float* weights;      // (N), 0: not part of the loss
  const double* log_ratios;  // (N), in place of a token's own, such as a sequence's mean; or null
  TokenColumns columns;
  Policy policy;
  Regularizers regularizers;
  float* loss;     // (N), weighted
  double* dlogps;  // (N), of the sum of the losses; with log_ratios, what does not go through them
  double* dlog_ratios;  // (N), null where log_ratios are
};

struct TokenLogpsParams {
  Problem problem;
  double* logps;   // (N), unrounded
  Lse* lse;        // (N)
  float* entropy;  // (N), may be null
};

struct TokenLogpsBackwardParams {
  Problem problem;
  Rows dlogits;           // (N, V), may be the logits
  const Lse* lse;         // (N)
  const float* entropy;   // (N), null where dentropy is
  const float* dlogps;    // (N)
  const float* dentropy;  // (N), may be null
};

}  // namespace cfpo
