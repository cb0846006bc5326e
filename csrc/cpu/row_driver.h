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
#include "core/row_math.h"
#include "cpu/levels.h"
#include "cpu/parallel.h"

namespace cfpo::cpu {

constexpr std::int64_t kSegment = 8192;        // elements
constexpr std::int64_t kHintColumns = 512;     // how many decide the first reference
constexpr std::int64_t kItemElements = 16384;  // short rows are handed out several at a time

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

  PartialSum segment(std::int64_t s, bool prefetch = false) const {
    const std::int64_t begin = s * kSegment;
    const std::int64_t n = std::min(kSegment, n_cols_ - begin);
    const char* second_half = data_ + n_cols_ / 2 * size_;
    return sum_(data_ + begin * size_, n, target_ - begin, scale_, hint_,
                prefetch ? second_half + begin / 2 * size_ : nullptr);
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
  SegmentOps::Sum sum_;
  const char* data_;
  std::int64_t n_cols_;
  std::int64_t size_;
  std::int64_t target_;
  float target_logit_;
  float scale_;
  float hint_;
};

// Columns [begin, begin + n) of a row's gradient.
inline void write_columns(const SegmentOps& ops, const Problem& problem, const Rows& dlogits,
                          std::int64_t row, std::int64_t begin, std::int64_t n,
                          const RowGradient& g, const void* prefetch, bool stream) {
  const std::int64_t offset = begin * dtype_size(dlogits.dtype);
  char* out = static_cast<char*>(dlogits.row(row)) + offset;
  ops.gradient(static_cast<const char*>(problem.logits.row(row)) + offset, out, n, g.coefs,
               prefetch, stream);
  const std::int64_t target = problem.token_ids[row] - begin;
  if (target >= 0 && target < n) ops.store(out, target, g.target);
}

inline void write_zeros(const Rows& dlogits, std::int64_t row) {
  if (dlogits.data == nullptr) return;
  std::memset(dlogits.row(row), 0, dlogits.n_cols * dtype_size(dlogits.dtype));
}

// For what a stage 2 provides see core/stages.h.
template <class Stage2>
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
      const DefaultFloatMode mode;
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
  static constexpr bool kSums = Stage2::kSums;

  // A remainder of rows that would keep some threads idle for a noticeable share of the time.
  std::int64_t rows_to_split(int threads) const {
    const bool worthwhile = threads > 1 && n_cols_ >= 2 * kSegment && n_rows_ < 8 * threads;
    return worthwhile ? n_rows_ % threads : 0;
  }

  RowSummer summer(std::int64_t row) const {
    return RowSummer(ops_, problem_, row, stage2_.entropy());
  }

  // A row's gradient has its first half of the next row fetched, the sums their own second half:
  // memory is asked for half a row at a time, evenly. `following` < 0: none.
  const void* prefetchable(std::int64_t following) const {
    if (following < 0 || stage2_.skip(following)) return nullptr;
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
    write_columns(ops_, problem_, dlogits_, row, 0, n_cols_, gradient, prefetchable(following),
                  stream_);
  }

  RowStats stats(std::int64_t row) const {
    if constexpr (kSums) {
      const RowSummer sums = summer(row);
      const bool prefetch = dlogits_.data != nullptr;
      return sums.merge([&](std::int64_t s) { return sums.segment(s, prefetch); });
    } else {
      return stage2_.stats(row, ops_.load(problem_.logits.row(row), problem_.token_ids[row]));
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
        gradients[k] = stage2_(row, stats(row));
      }
    }
    if (dlogits_.data == nullptr) return;
#pragma omp for schedule(dynamic, 1)
    for (std::int64_t k = 0; k < count * segments_; ++k) {
      const std::int64_t row = first + k / segments_;
      if (stage2_.skip(row)) continue;
      const std::int64_t begin = k % segments_ * kSegment;
      const std::int64_t n = std::min(kSegment, n_cols_ - begin);
      write_columns(ops_, problem_, dlogits_, row, begin, n, gradients[k / segments_], nullptr,
                    stream_);
    }
  }

  const SegmentOps& ops_;
  const Problem& problem_;
  const Rows& dlogits_;
  const Stage2& stage2_;
  std::int64_t n_rows_, n_cols_, segments_;
  bool stream_ = false;
};

}  // namespace cfpo::cpu
