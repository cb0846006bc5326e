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
#include "cpu/memory.h"
#include "cpu/parallel.h"

namespace cfpo::cpu {

constexpr std::int64_t kSegment = 8192;        // elements
constexpr std::int64_t kHintColumns = 512;     // how many decide the first reference
constexpr std::int64_t kItemElements = 16384;  // short rows are handed out several at a time
// Below, to bring threads together three times takes as long as the row on one of them.
constexpr std::int64_t kSplitColumns = 3 * kSegment;

// What a segment leaves: its sums, and for the entropy those without its largest element where that
// has nearly all of them.
struct SegmentPart {
  PartialSum all;
  PartialSum rest;
  std::int64_t peak = -1;  // column of the row
  float peak_logit = 0.0f;
  float least = -INFINITY;  // as of SegmentSum
};

// What the sweeps take from a row's scalars; the peak's gradient is stored like the target's.
struct GradientParts {
  RowGradient gradient;
  std::int64_t peak = -1;
  float peak_value = 0.0f;
  float least = -INFINITY;  // no other logit is below, as far as is known
};

// The sweeps over a type of elements, and over what a softcap makes of them in float32.
struct Sweeps {
  const SegmentOps& ops;
  const SegmentOps& floats;

  float capped(const Problem& problem, float logit) const {
    float y = logit;
    if (problem.softcap.cap != 0.0f) floats.cap(&logit, &y, 1, problem.softcap, nullptr);
    return y;
  }
};

inline double target_logit(const SegmentOps& ops, const Problem& problem, std::int64_t row) {
  const std::int64_t column = problem.column(row);
  if (column < 0) return problem.absent_logit();
  const float logit = ops.load(problem.logits.row(row), column);
  return problem.softcap.cap == 0.0f ? logit : capped_logit(problem.softcap, logit);
}

class RowSummer {
 public:
  RowSummer(const Sweeps& sweeps, const Problem& problem, std::int64_t row, bool entropy)
      : sweeps_(sweeps),
        softcap_(problem.softcap),
        entropy_(entropy),
        data_(static_cast<const char*>(problem.logits.row(row))),
        n_cols_(problem.logits.n_cols),
        size_(dtype_size(problem.logits.dtype)),
        target_(problem.column(row)),
        target_logit_(target_logit(sweeps.ops, problem, row)),
        sharded_(problem.sharded),
        scale_(row_scale(problem, row)),
        hint_(hint(problem)) {}

  SegmentPart segment(std::int64_t s, bool prefetch = false) const {
    const std::int64_t begin = s * kSegment;
    const std::int64_t n = std::min(kSegment, n_cols_ - begin);
    const char* x = data_ + begin * size_;
    const char* ahead = prefetch ? data_ + (n_cols_ / 2 + begin / 2) * size_ : nullptr;
    if (softcap_.cap == 0.0f) return sum(sweeps_.ops, x, size_, begin, n, ahead);
    alignas(64) float y[kSegment];
    sweeps_.ops.cap(x, y, n, softcap_, ahead);
    return sum(sweeps_.floats, y, sizeof(float), begin, n, nullptr);
  }
  template <class PartOf>
  RowStats merge(PartOf part_of, Peak& peak, float& least) const {
    RowSum rest;
    PeakedSum peaked;
    for (std::int64_t s = 0; s * kSegment < n_cols_; ++s) {
      const SegmentPart part = part_of(s);
      rest.add(row_sum(part.all));
      least = std::min(least, part.least);
      if (entropy_) {
        peaked.add(row_sum(part.rest), scale_, part.peak_logit, part.peak);
      }
    }
    RowStats stats = join_target(scale_, target_logit_, rest, sharded_);
    if (entropy_ && stats.sum > 0.0) {
      peak = peak_of(scale_, target_logit_, peaked, stats.ref);
      if (peak.at >= 0) peak.apply(stats);
    }
    return stats;
  }

 private:
  static RowSum row_sum(const PartialSum& part) { return {part.ref, part.sum, part.weighted}; }

  float hint(const Problem& problem) const {
    const float top = sweeps_.ops.max(data_, std::min(n_cols_, kHintColumns), target_);
    // -inf may stand for no column at all.
    return std::ceil((top == -INFINITY ? top : sweeps_.capped(problem, top)) * scale_);
  }

  // Of elements of `size` bytes, those from column `begin`.
  SegmentPart sum(const SegmentOps& ops, const void* x, std::int64_t size, std::int64_t begin,
                  std::int64_t n, const void* ahead) const {
    const SegmentOps::Sum sweep = entropy_ ? ops.sum_weighted : ops.sum;
    const SegmentSum got = sweep(x, n, target_ - begin, scale_, hint_, narrow_, ahead);
    SegmentPart part{got.sums, got.sums};
    part.least = got.least;
    // Where one segment has bans, so have others: do not try in vain. Changes no bit.
    narrow_ = got.least != -INFINITY;
    if (got.peaked) leave_out_peak(ops, x, size, begin, n, part);
    return part;
  }

  // Sums the segment a second time; of confident rows few have another token asked for.
  void leave_out_peak(const SegmentOps& ops, const void* x, std::int64_t size, std::int64_t begin,
                      std::int64_t n, SegmentPart& part) const {
    const std::int64_t skip = target_ - begin;
    const float logit = ops.max(x, n, skip);
    const std::int64_t at = ops.find(x, n, skip, logit);
    if (at < 0) return;
    alignas(64) char copy[kSegment * sizeof(float)];
    std::memcpy(copy, x, n * size);
    ops.store(copy, at, -INFINITY);
    part.rest = ops.sum_weighted(copy, n, skip, scale_, NAN, false, nullptr).sums;
    part.peak = begin + at;
    part.peak_logit = logit;
  }

  const Sweeps& sweeps_;
  Softcap softcap_;
  bool entropy_;
  const char* data_;
  std::int64_t n_cols_;
  std::int64_t size_;
  std::int64_t target_;
  double target_logit_;
  bool sharded_;
  float scale_;
  float hint_;
  mutable bool narrow_ = true;
};

// The likeliest token of a row but its target, if it has most of the mass; from the row's lse.
template <class Stage2>
Peak find_peak(const Sweeps& sweeps, const Stage2& stage2, std::int64_t row) {
  const SegmentOps& ops = sweeps.ops;
  const Problem& problem = stage2.p.problem;
  const char* data = static_cast<const char*>(problem.logits.row(row));
  const std::int64_t n_cols = problem.logits.n_cols, size = dtype_size(problem.logits.dtype);
  const std::int64_t target = problem.column(row);
  float top = -INFINITY;
  std::int64_t segment = 0;
  for (std::int64_t begin = 0; begin < n_cols; begin += kSegment) {
    const float largest =
        ops.max(data + begin * size, std::min(kSegment, n_cols - begin), target - begin);
    if (largest > top) {
      top = largest;
      segment = begin;
    }
  }
  Peak peak = stage2.peak(row, sweeps.capped(problem, top), segment);
  if (peak.at >= 0) {
    peak.at += ops.find(data + segment * size, std::min(kSegment, n_cols - segment),
                        target - segment, top);
  }
  return peak;
}

// Columns [begin, begin + n) of a row's gradient.
inline void write_columns(const Sweeps& sweeps, const Problem& problem, const Rows& dlogits,
                          std::int64_t row, std::int64_t begin, std::int64_t n,
                          const GradientParts& parts, const void* prefetch, bool stream) {
  const SegmentOps& ops = sweeps.ops;
  const std::int64_t offset = begin * dtype_size(dlogits.dtype);
  const char* x = static_cast<const char*>(problem.logits.row(row)) + offset;
  char* out = static_cast<char*>(dlogits.row(row)) + offset;
  // What is not the sweep's: the peak's element and the target's.
  struct Single {
    std::int64_t column;
    float value;
  };
  Single singles[] = {{parts.peak - begin, parts.peak_value},
                      {problem.column(row) - begin, parts.gradient.target}};
  const auto is_here = [&](const Single& s) { return s.column >= 0 && s.column < n; };
  if (problem.softcap.cap == 0.0f) {
    ops.gradient(x, out, n, parts.gradient.coefs, parts.least, prefetch, stream);
  } else {
    for (Single& s : singles) {  // before the logits are overwritten
      if (!is_here(s)) continue;
      s.value *= softcap_slope(problem.softcap, sweeps.capped(problem, ops.load(x, s.column)));
    }
    ops.capped_gradient(x, out, n, parts.gradient.coefs, problem.softcap, prefetch);
  }
  for (const Single& s : singles) {
    if (is_here(s)) ops.store(out, s.column, s.value);
  }
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
  RowDriver(const Sweeps& sweeps, const Problem& problem, const Rows& dlogits, const Stage2& stage2)
      : sweeps_(sweeps),
        problem_(problem),
        dlogits_(dlogits),
        stage2_(stage2),
        n_rows_(problem.logits.n_rows),
        n_cols_(problem.logits.n_cols),
        segments_((n_cols_ + kSegment - 1) / kSegment),
        stream_(dlogits.data != problem.logits.data &&
                n_rows_ * n_cols_ * dtype_size(dlogits.dtype) > last_level_cache_bytes()) {}

  void run(int threads) {
    threads = ForkGuard::allowed(threads);
    const std::int64_t split = rows_to_split(threads);
    const std::int64_t whole = n_rows_ - split;
    const std::int64_t rows_per_item = std::max<std::int64_t>(1, kItemElements / n_cols_);
    const std::int64_t items = (whole + rows_per_item - 1) / rows_per_item;
    if (split == 0 && items < threads) threads = items > 1 ? static_cast<int>(items) : 1;
    WorkQueue queue(items);
    std::vector<SegmentPart> partials(kSums ? split * segments_ : 0);
    std::vector<GradientParts> gradients(split);
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
    const bool worthwhile = threads > 1 && n_cols_ >= kSplitColumns && n_rows_ < 8 * threads;
    return worthwhile ? n_rows_ % threads : 0;
  }

  RowSummer summer(std::int64_t row) const {
    return RowSummer(sweeps_, problem_, row, stage2_.entropy());
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
    const bool prefetch = dlogits_.data != nullptr;
    const GradientParts parts = gradient_parts(
        row, [&](const RowSummer& sums, std::int64_t s) { return sums.segment(s, prefetch); });
    if (dlogits_.data == nullptr) return;
    write_columns(sweeps_, problem_, dlogits_, row, 0, n_cols_, parts, prefetchable(following),
                  stream_);
  }

  // Stages 1 and 2; part_of(sums, s) is what segment s leaves.
  template <class PartOf>
  GradientParts gradient_parts(std::int64_t row, PartOf part_of) {
    Peak peak;
    RowStats stats;
    float least = -INFINITY;
    if constexpr (kSums) {
      const RowSummer sums = summer(row);
      least = INFINITY;
      stats = sums.merge([&](std::int64_t s) { return part_of(sums, s); }, peak, least);
    } else {
      stats = stage2_.stats(row, target_logit(sweeps_.ops, problem_, row));
      if (stage2_.may_peak(row)) peak = find_peak(sweeps_, stage2_, row);
    }
    const RowDerivatives derivatives = stage2_.derivatives(row, stats);
    GradientParts parts{row_gradient(stats, derivatives)};
    parts.least = least;
    if (peak.at >= 0) {
      parts.peak = peak.at;
      parts.peak_value = peak_gradient(stats.scale, peak, derivatives);
    }
    return parts;
  }

  // Called by every thread of the team. The same thread sums a segment and writes its gradient: it
  // has it in its cache.
  void split_rows(std::int64_t first, std::int64_t count, std::vector<SegmentPart>& partials,
                  std::vector<GradientParts>& gradients) {
    if constexpr (kSums) {
#pragma omp for schedule(static)
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
      } else {
        gradients[k] = gradient_parts(
            row, [&](const RowSummer&, std::int64_t s) { return partials[k * segments_ + s]; });
      }
    }
    if (dlogits_.data == nullptr) return;
#pragma omp for schedule(static)
    for (std::int64_t k = 0; k < count * segments_; ++k) {
      const std::int64_t row = first + k / segments_;
      if (stage2_.skip(row)) continue;
      const std::int64_t begin = k % segments_ * kSegment;
      const std::int64_t n = std::min(kSegment, n_cols_ - begin);
      write_columns(sweeps_, problem_, dlogits_, row, begin, n, gradients[k / segments_], nullptr,
                    stream_);
    }
  }

  const Sweeps& sweeps_;
  const Problem& problem_;
  const Rows& dlogits_;
  const Stage2& stage2_;
  std::int64_t n_rows_, n_cols_, segments_;
  bool stream_;  // the output would only push the logits out of the caches
};

}  // namespace cfpo::cpu
