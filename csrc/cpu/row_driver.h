// Runs the three stages over many rows on several threads:
//   (1) sum the row's exponentials   (2) a scalar function of the row   (3) write its gradient
//
// A row is worked on in segments of fixed size whose sums are merged in order, so that its result
// depends on nothing but its own logits: not on the batch, the threads, or which of the two ways
// below was taken. Rows go to threads one by one; where that would leave threads idle, the last
// few rows are split by segments instead.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "core/params.h"
#include "cpu/levels.h"
#include "cpu/parallel.h"

namespace cfpo::cpu {

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;
constexpr std::int64_t kSegment = 8192;        // elements
constexpr std::int64_t kHintColumns = 512;     // how many decide the first reference
constexpr std::int64_t kItemElements = 16384;  // short rows are handed out several at a time

// What stage 1 leaves of a row; u_v = z_v * scale - ref, p_v = 2^u_v / sum.
struct RowStats {
  float scale;  // log2(e) / T
  float ref;
  double sum;
  double logp;        // of the target, nats
  double complement;  // 1 - p of the target, to full relative accuracy
  double entropy;     // nats; 0 unless asked for

  double lse() const { return (ref + std::log2(sum)) / scale; }  // T * logsumexp(z / T)
};

// What stage 3 needs: d_v = coefs(v) off the target, and the target's own value.
struct RowGradient {
  GradientCoefs coefs{};
  float target = 0.0f;
};

inline float row_scale(const Problem& p, std::int64_t row) {
  return static_cast<float>(kLog2E / p.temperature[row * p.temperature_stride]);
}

// Sums over part of a row, in float64 and with the reference taken along.
struct RowSum {
  double ref = -INFINITY;
  double sum = 0.0;
  double weighted = 0.0;

  void rebase(double top) {
    if (sum != 0.0) weighted = (weighted + (ref - top) * sum) * std::exp2(ref - top);
    if (sum != 0.0) sum *= std::exp2(ref - top);
    ref = top;
  }
  void add(RowSum part) {
    const double top = std::max(ref, part.ref);
    rebase(top);
    part.rebase(top);
    sum += part.sum;
    weighted += part.weighted;
  }
};

// Joins the target, which the sums leave out, with the rest of its row. That way 1 - p and log p
// of a likely token keep their relative accuracy.
inline RowStats join_target(float scale, float target, RowSum rest) {
  const double u = static_cast<double>(target) * scale;
  // A float, because that is what stage 3 takes; any reference near the largest u is exact. A
  // float beyond 2^31 need not be near: such a row is given up rather than got wrong.
  double top = std::max<double>(rest.ref, static_cast<float>(std::ceil(u)));
  if (std::abs(top) >= kLargestRef) top = NAN;
  rest.rebase(top);
  const double mass = std::exp2(u - top);  // NaN for a target of NaN or +inf, or a row of -inf
  const double sum = rest.sum + mass;
  const double weighted = rest.weighted + (mass == 0.0 ? 0.0 : (u - top) * mass);
  const double log2_sum = std::log2(sum);
  RowStats stats;
  stats.scale = scale;
  stats.ref = static_cast<float>(top);
  stats.sum = sum;
  stats.logp = mass > rest.sum ? 0.0 - std::log1p(rest.sum / mass) : (u - top - log2_sum) * kLn2;
  stats.complement = rest.sum / sum;
  stats.entropy = (log2_sum - weighted / sum) * kLn2;
  return stats;
}

// The stats of a row whose sums an earlier call has left as its lse.
inline RowStats stats_from_lse(float scale, float target, double lse, double entropy) {
  const double log2_total = lse * scale;
  const float ref = static_cast<float>(std::floor(log2_total));
  const double logp = (static_cast<double>(target) * scale - log2_total) * kLn2;
  return {scale, ref, std::exp2(log2_total - ref), logp, -std::expm1(logp), entropy};
}

class RowSummer {
 public:
  RowSummer(const SegmentOps& ops, const Problem& problem, std::int64_t row, bool entropy)
      : sum_(entropy ? ops.sum_weighted : ops.sum),
        data_(static_cast<const char*>(problem.logits.row(row))),
        n_cols_(problem.logits.n_cols),
        size_(dtype_size(problem.logits.dtype)),
        target_(problem.token_ids[row]),
        target_logit_(ops.load(data_, target_)),
        scale_(row_scale(problem, row)),
        hint_(std::ceil(ops.max(data_, std::min(n_cols_, kHintColumns), target_) * scale_)) {}

  PartialSum segment(std::int64_t s) const {
    const std::int64_t begin = s * kSegment;
    const std::int64_t n = std::min(kSegment, n_cols_ - begin);
    return sum_(data_ + begin * size_, n, target_ - begin, scale_, hint_);
  }
  template <class PartialOf>
  RowStats merge(PartialOf partial_of) const {
    RowSum rest;
    for (std::int64_t s = 0; s * kSegment < n_cols_; ++s) {
      const PartialSum part = partial_of(s);
      rest.add({part.ref, part.sum, part.weighted});
    }
    return join_target(scale_, target_logit_, rest);
  }

 private:
  PartialSum (*sum_)(const void*, std::int64_t, std::int64_t, float, float);
  const char* data_;
  std::int64_t n_cols_;
  std::int64_t size_;
  std::int64_t target_;
  float target_logit_;
  float scale_;
  float hint_;
};

// A NaN that came from outside may carry bits that rounding to bfloat16 would turn into a number.
inline float plain_nan(double x) { return std::isnan(x) ? NAN : static_cast<float>(x); }

// c = d loss / d logp, h = the factor of p_v (log p_v + H); 1/T comes from scale.
inline RowGradient row_gradient(const RowStats& s, double c, double h) {
  const double inv_t = s.scale * kLn2;
  const double p = std::exp(s.logp);
  const double log_sum = std::log(s.sum);
  const double entropy_term = h == 0.0 || p == 0.0 ? 0.0 : h * p * (s.logp + s.entropy);
  RowGradient g;
  g.coefs = {s.scale, s.ref, plain_nan(inv_t * (h * (s.entropy - log_sum) - c) / s.sum),
             plain_nan(inv_t * h * kLn2 / s.sum)};
  g.target = plain_nan(inv_t * (c * s.complement + entropy_term));
  return g;
}

// Columns [begin, begin + n) of a row's gradient.
inline void write_columns(const SegmentOps& ops, const Problem& problem, const Rows& dlogits,
                          std::int64_t row, std::int64_t begin, std::int64_t n,
                          const RowGradient& g, const void* prefetch) {
  const std::int64_t offset = begin * dtype_size(dlogits.dtype);
  char* out = static_cast<char*>(dlogits.row(row)) + offset;
  ops.gradient(static_cast<const char*>(problem.logits.row(row)) + offset, out, n, g.coefs,
               prefetch);
  const std::int64_t target = problem.token_ids[row] - begin;
  if (target >= 0 && target < n) ops.store(out, target, g.target);
}

inline void write_zeros(const Rows& dlogits, std::int64_t row) {
  if (dlogits.data == nullptr) return;
  std::memset(dlogits.row(row), 0, dlogits.n_cols * dtype_size(dlogits.dtype));
}

// A Stage2 provides
//   bool skip(row)             the row is not read and its gradient is zeros
//   bool entropy()             stage 1 must sum for the entropy
//   RowGradient operator()(row, stats)
//   void skipped(row)          sets the scalar outputs of such a row
// and, where kSums is false (stage 1 ran in an earlier call), RowStats stats(row).
template <bool kSums, class Stage2>
class RowDriver {
 public:
  // A `dlogits` without data: no stage 3.
  RowDriver(const SegmentOps& ops, const Problem& problem, const Rows& dlogits,
            const Stage2& stage2)
      : ops_(ops),
        problem_(problem),
        dlogits_(dlogits),
        stage2_(stage2),
        n_rows_(problem.logits.n_rows),
        n_cols_(problem.logits.n_cols),
        segments_((n_cols_ + kSegment - 1) / kSegment) {}

  void run(int threads) {
    threads = ForkGuard::allowed(threads);
    const std::int64_t split = rows_to_split(threads);
    const std::int64_t whole = n_rows_ - split;
    const std::int64_t rows_per_item = std::max<std::int64_t>(1, kItemElements / n_cols_);
    WorkQueue queue((whole + rows_per_item - 1) / rows_per_item);
    std::vector<PartialSum> partials(kSums ? split * segments_ : 0);
    std::vector<RowGradient> gradients(split);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      queue.drain([&](std::int64_t item, std::int64_t next) {
        const std::int64_t begin = item * rows_per_item;
        const std::int64_t end = std::min(whole, begin + rows_per_item);
        for (std::int64_t row = begin; row < end; ++row) {
          const std::int64_t following = row + 1 < end ? row + 1 : next * rows_per_item;
          whole_row(row, following);
        }
      });
      if (split > 0) split_rows(whole, split, partials, gradients);
    }
  }

 private:
  // A remainder of rows that would keep some threads idle for a noticeable share of the time.
  std::int64_t rows_to_split(int threads) const {
    const bool worthwhile = threads > 1 && n_cols_ >= 2 * kSegment && n_rows_ < 8 * threads;
    return worthwhile ? n_rows_ % threads : 0;
  }

  RowSummer summer(std::int64_t row) const {
    return RowSummer(ops_, problem_, row, stage2_.entropy());
  }

  // `following` < 0: none
  const void* prefetchable(std::int64_t following) const {
    const std::int64_t bytes = n_cols_ * dtype_size(problem_.logits.dtype);
    if (following < 0 || bytes > kPrefetchBytes || stage2_.skip(following)) return nullptr;
    return problem_.logits.row(following);
  }

  void whole_row(std::int64_t row, std::int64_t following) {
    if (stage2_.skip(row)) {
      write_zeros(dlogits_, row);
      stage2_.skipped(row);
      return;
    }
    const RowGradient gradient = stage2_(row, stats(row));
    if (dlogits_.data == nullptr) return;
    write_columns(ops_, problem_, dlogits_, row, 0, n_cols_, gradient, prefetchable(following));
  }

  RowStats stats(std::int64_t row) const {
    if constexpr (kSums) {
      const RowSummer sums = summer(row);
      return sums.merge([&](std::int64_t s) { return sums.segment(s); });
    } else {
      return stage2_.stats(row);
    }
  }

  // Called by every thread of the team.
  void split_rows(std::int64_t first, std::int64_t count, std::vector<PartialSum>& partials,
                  std::vector<RowGradient>& gradients) {
    if constexpr (kSums) {
#pragma omp for schedule(dynamic, 1)
      for (std::int64_t k = 0; k < count * segments_; ++k) {
        const std::int64_t row = first + k / segments_;
        if (!stage2_.skip(row)) partials[k] = summer(row).segment(k % segments_);
      }
    }
#pragma omp for schedule(static)
    for (std::int64_t k = 0; k < count; ++k) {
      const std::int64_t row = first + k;
      if (stage2_.skip(row)) {
        write_zeros(dlogits_, row);
        stage2_.skipped(row);
      } else if constexpr (kSums) {
        gradients[k] = stage2_(
            row, summer(row).merge([&](std::int64_t s) { return partials[k * segments_ + s]; }));
      } else {
        gradients[k] = stage2_(row, stage2_.stats(row));
      }
    }
    if (dlogits_.data == nullptr) return;
#pragma omp for schedule(dynamic, 1)
    for (std::int64_t k = 0; k < count * segments_; ++k) {
      const std::int64_t row = first + k / segments_;
      if (stage2_.skip(row)) continue;
      const std::int64_t begin = k % segments_ * kSegment;
      const std::int64_t n = std::min(kSegment, n_cols_ - begin);
      write_columns(ops_, problem_, dlogits_, row, begin, n, gradients[k / segments_], nullptr);
    }
  }

  // Two rows must fit a core's L2 beside each other for the next one to be fetched early.
  static constexpr std::int64_t kPrefetchBytes = 400 * 1024;

  const SegmentOps& ops_;
  const Problem& problem_;
  const Rows& dlogits_;
  const Stage2& stage2_;
  std::int64_t n_rows_, n_cols_, segments_;
};

}  // namespace cfpo::cpu
