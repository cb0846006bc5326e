// Whole rows: sums, stage 2 and gradient in one kernel, one read and one write of the logits.
//
// Blocks are persistent and work on `rows_per_block` rows at a time, with `warps_per_row` warps on
// each. A warp owns every warps_per_row-th segment of its row and fetches, sums and writes it by
// itself, through windows of its own: warps meet only to exchange a row's sums. What fits stays in
// its window from the first sweep to the second. Of the rest, the last segments are still in the
// window that they passed through, and the second sweep goes backwards from there, so that it reads
// again from L2 what L2 has seen last. As windows become free they fetch the next row: copies are
// under way while gradients are written.
#pragma once

#include "cuda/segment.cuh"

namespace cfpo::cuda {

// One warp's windows and the copies on their way into them, which land in the order of fetching.
template <class T>
class Windows {
 public:
  CFPO_DEVICE explicit Windows(int first) : offset_(first * kWindowBytes) {}

  CFPO_DEVICE char* at(int slot) const {
    return hw::shared_memory() + (offset_ + slot * kWindowBytes);
  }
  // The window's former content has been read by the whole warp when the copy starts.
  CFPO_DEVICE void fetch(int slot, const Segment<const T>& segment, hw::Policy policy) {
    hw::sync_warp();
    fetch_segment(at(slot), segment, policy);
    ++under_way_;
  }
  // The oldest copy under way has landed.
  CFPO_DEVICE void wait() {
    hw::wait_copies(--under_way_);
    hw::sync_warp();
  }

 private:
  int offset_;
  int under_way_ = 0;
};

// Registers are what limits the number of warps: all that a few instructions can work out again is
// worked out again.
template <class T, class Stage, bool kEntropy>
class RowWorker {
 public:
  CFPO_DEVICE RowWorker(const Stage& stage, const Rows& dlogits, const RowPlan& plan)
      : stage_(stage),
        logits_(stage.p.problem.logits),
        dlogits_(dlogits),
        plan_(plan),
        first_(static_cast<int>(hw::block_index()) * plan.rows_per_block),
        windows_(plan.windows_before(warp_index())) {}

  CFPO_DEVICE void run() {
    next_x_ = find_row(first_);
    for (; first_ < n_rows(); first_ = following()) {
      x_ = next_x_;
      next_x_ = find_row(following());
      if (leads()) shared_row(hw::thread_index()).target = target_logit();
      if (x_ != nullptr) {
        token_ = static_cast<int>(problem().column(row()));
        if (!started_) start(x_);
        if (Stage::kSums) sum_row();
      }
      second_stage();
      if (dlogits_.data != nullptr && row() < n_rows()) write_row();
    }
  }

 private:
  // The block's rows are numbered from first_. This warp is number part() of those that work on
  // row(), and its segments are numbered from 0, count() of them.
  CFPO_DEVICE const Problem& problem() const { return stage_.p.problem; }
  CFPO_DEVICE int n_rows() const { return static_cast<int>(logits_.n_rows); }
  CFPO_DEVICE int row_in_block() const { return warp_index() >> plan_.log2_warps_per_row; }
  CFPO_DEVICE int row() const { return first_ + row_in_block(); }
  CFPO_DEVICE int part() const { return warp_index() & (plan_.warps_per_row() - 1); }
  CFPO_DEVICE int count() const {
    return (plan_.n_segments - part() + plan_.warps_per_row() - 1) >> plan_.log2_warps_per_row;
  }
  CFPO_DEVICE int segment_number(int i) const { return part() + (i << plan_.log2_warps_per_row); }
  CFPO_DEVICE int following() const {
    return first_ + static_cast<int>(hw::block_count()) * plan_.rows_per_block;
  }

  // This warp's row of the block's rows from `first`; null: no row, or one that is not read.
  CFPO_DEVICE const T* find_row(int first) const {
    const int index = first + row_in_block();
    const bool active = index < n_rows() && !stage_.skip(index);
    return active ? static_cast<const T*>(logits_.row(index)) : nullptr;
  }

  // Thread k looks after the block's row k.
  CFPO_DEVICE int led_row() const { return first_ + hw::thread_index(); }
  CFPO_DEVICE bool leads() const {
    return hw::thread_index() < plan_.rows_per_block && led_row() < n_rows();
  }
  // Read early, since nothing else hides the latency.
  CFPO_DEVICE float target_logit() const {
    if (stage_.skip(led_row())) return 0.0f;
    const std::int64_t column = problem().column(led_row());
    if (column < 0) return problem().absent_logit();
    return load_element(static_cast<const T*>(logits_.row(led_row())) + column);
  }

  // Rows are kept where both sweeps are wanted, else they pass. base_ is the window of the row's
  // first segment; which window segment i has, and what that takes next:
  //
  //   kept, i < kept()   base_ + i                         the next row's segment i, once written
  //   kept, others       kRing behind these, by turns      the segment kRing on, in either sweep
  //   kept, spare()      base_ + i, base_ 0 or count()     (room for two rows: one fetched ahead)
  //   passing            (base_ + i) % ahead()             the segment ahead() on, or a next row's
  CFPO_DEVICE bool keeps_rows() const { return Stage::kSums && dlogits_.data != nullptr; }
  CFPO_DEVICE int n_windows() const { return plan_.windows + (warp_index() < plan_.extra_windows); }
  CFPO_DEVICE int kept() const { return count() <= n_windows() ? count() : n_windows() - kRing; }
  CFPO_DEVICE bool spare() const { return n_windows() >= 2 * count(); }
  CFPO_DEVICE int ahead() const { return count() < n_windows() ? count() : n_windows(); }
  CFPO_DEVICE int window(int i) const {
    if (!keeps_rows()) return (base_ + i) % ahead();
    return base_ + (i < kept() ? i : kept() + (i - kept()) % kRing);
  }

  CFPO_DEVICE void fetch(const T* x, int i, int slot) {
    const bool twice = keeps_rows() && i >= kept() && i < count() - kRing;
    windows_.fetch(slot, Segment<const T>(x, logits_.n_cols, segment_number(i)),
                   twice ? hw::read_again() : hw::read_once());
  }
  CFPO_DEVICE void start(const T* x) {
    for (int i = 0; i < ahead(); ++i) fetch(x, i, window(i));
  }

  CFPO_DEVICE void sum_row() {
    const float scale = row_scale(problem(), row());
    if (keeps_rows() && spare() && next_x_ != nullptr) {
      for (int i = 0; i < count(); ++i) fetch(next_x_, i, (base_ == 0 ? count() : 0) + i);
    }
    for (int i = 0; i < count(); ++i) {
      windows_.wait();
      const SegmentSum<kEntropy> part = sum_segment<T, kEntropy>(
          windows_.at(window(i)), Segment<const T>(x_, logits_.n_cols, segment_number(i)),
          column_in_segment<T>(token_, segment_number(i)), scale);
      if (lane_index() == 0) parts()[segment_number(i)] = part;
      if (!keeps_rows()) {
        pass(i);
      } else if (i >= kept() && i + kRing < count()) {
        fetch(x_, i + kRing, window(i));
      }
    }
    if (!keeps_rows()) passed();
  }

  // After segment i of a row that passes: its window takes a later one, or one of the next row.
  CFPO_DEVICE void pass(int i) {
    const int later = i + ahead();
    if (later < count()) {
      fetch(x_, later, window(i));
    } else if (next_x_ != nullptr) {
      fetch(next_x_, later - count(), window(i));
    }
  }
  CFPO_DEVICE void passed() {
    if (count() > 0) base_ = (base_ + count()) % ahead();
    started_ = next_x_ != nullptr;
  }

  // The row's sums meet; one thread a row computes its scalars; every warp learns the gradient.
  CFPO_DEVICE void second_stage() {
    hw::sync_block();
    if (Stage::kSums) {
      if (part() == 0 && x_ != nullptr) {
        if constexpr (kEntropy) {
          const MergedRow merged =
              merge_peaked(parts(), plan_.n_segments, row_scale(problem(), row()),
                           shared_row(row_in_block()).target);
          if (lane_index() == 0) shared_row(row_in_block()).merged = merged;
        } else {
          const RowSum sum = merge_plain(parts(), plan_.n_segments);
          if (lane_index() == 0) shared_row(row_in_block()).merged.sum = sum;
        }
      }
      hw::sync_block();
    }
    const bool settles = leads() && !stage_.skip(led_row());
    SharedRow& shared = shared_row(hw::thread_index());
    if (settles) shared.stats = stats(shared);
    hw::sync_warp();  // so that registers do not keep them
    if (settles) {
      settle(shared);
    } else if (leads()) {
      stage_.skipped(led_row());
    }
    hw::sync_block();
  }
  CFPO_DEVICE RowStats stats(const SharedRow& shared) const {
    const float scale = row_scale(problem(), led_row());
    if constexpr (!Stage::kSums) {
      return stage_.stats(led_row(), shared.target);
    } else if constexpr (kEntropy) {
      return stats_of(scale, shared.target, shared.merged, problem().sharded);
    } else {
      return join_target(scale, shared.target, shared.merged.sum, problem().sharded);
    }
  }
  CFPO_DEVICE void settle(SharedRow& shared) const {
    if constexpr (!Stage::kSums) {
      shared.gradient = settle_from_lse(stage_, led_row(), shared.stats);
    } else if constexpr (kEntropy) {
      shared.gradient = settle_peaked(stage_, led_row(), shared.stats, shared.merged, true);
    } else {
      shared.gradient.gradient = stage_(led_row(), shared.stats);
    }
  }

  CFPO_DEVICE void write_row() {
    T* out = static_cast<T*>(dlogits_.row(row()));
    if (x_ == nullptr) {
      for (int i = 0; i < count(); ++i) {
        write_zeros(Segment<T>(out, logits_.n_cols, segment_number(i)));
      }
      started_ = false;
    } else {
      write_gradients(out, shared_row(row_in_block()).gradient);
    }
  }
  CFPO_DEVICE void write_gradients(T* out, const PeakedGradient& g) {
    const int first_kept = keeps_rows() ? count() - kept() : 0;
    for (int step = 0; step < count(); ++step) {
      // From the last back to the kept ones, which come in order.
      const int i = step < first_kept ? count() - 1 - step : step - first_kept;
      const bool in_window = keeps_rows() && (i < kept() || i >= count() - kRing);
      if (!in_window) windows_.wait();
      write_gradient<T, kLinear>(windows_.at(window(i)), alignment_shift(x_),
                                 Segment<T>(out, logits_.n_cols, segment_number(i)),
                                 column_in_segment<T>(token_, segment_number(i)), g.gradient,
                                 slope_of(stage_));
      if (kPeaks && (g.segment == segment_number(i) || g.segment == kAnySegment)) {
        write_peak(windows_.at(window(i)), alignment_shift(x_),
                   Segment<T>(out, logits_.n_cols, segment_number(i)),
                   column_in_segment<T>(token_, segment_number(i)), stage_, row(), g);
      }
      if (!keeps_rows()) {
        pass(i);
      } else if (i >= kept()) {
        if (i - kRing >= kept()) fetch(x_, i - kRing, window(i));
      } else if (next_x_ != nullptr && !spare()) {
        fetch(next_x_, i, window(i));
      }
    }
    if (!keeps_rows()) return passed();
    if (spare()) {
      base_ = base_ == 0 ? count() : 0;
    } else if (next_x_ != nullptr) {
      for (int i = kept(); i < ahead(); ++i) fetch(next_x_, i, window(i));
    }
    started_ = next_x_ != nullptr;
  }

  CFPO_DEVICE SharedRow& shared_row(int number) const {
    char* rows = hw::shared_memory() + RowSharedMemory(plan_).rows;
    return reinterpret_cast<SharedRow*>(rows)[number];
  }
  CFPO_DEVICE SegmentSum<kEntropy>* parts() const {
    return reinterpret_cast<SegmentSum<kEntropy>*>(hw::shared_memory() +
                                                   RowSharedMemory(plan_).parts) +
           row_in_block() * plan_.n_segments;
  }

  // Only an entropy bonus makes it so; where there are no sums, whoever made them decided.
  static constexpr bool kLinear = kEntropy || !Stage::kSums;
  static constexpr bool kPeaks = kLinear && Stage::kGradient;

  const Stage& stage_;
  const Rows& logits_;
  const Rows& dlogits_;
  const RowPlan& plan_;
  int first_;
  Windows<T> windows_;
  const T* x_ = nullptr;       // this warp's row; null: not read
  const T* next_x_ = nullptr;  // the one after
  int token_ = 0;
  int base_ = 0;
  bool started_ = false;  // the row's first copies are under way since the row before
};

template <class T, class Stage, bool kEntropy>
CFPO_KERNEL(kRowThreadsPerSm, 1)
row_kernel(CFPO_ARGUMENT Stage stage, CFPO_ARGUMENT Rows dlogits, CFPO_ARGUMENT RowPlan plan) {
  RowWorker<T, Stage, kEntropy>(stage, dlogits, plan).run();
}

}  // namespace cfpo::cuda
