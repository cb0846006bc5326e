// Few rows: every segment gets a warp of its own, anywhere on the device. One kernel leaves the
// segments' sums in memory; the next merges them, in every block anew rather than in one that all
// others wait for, and writes the gradient. The bits are those of the row kernel.
#pragma once

#include "cuda/segment.cuh"

namespace cfpo::cuda {

// Block (x, y): row x, segments from y * warps. The warp's segment, or one past the end.
CFPO_DEVICE int split_segment() {
  return hw::block_index_y() * (hw::block_threads() / kWarpThreads) + warp_index();
}

// Starts to copy the warp's segment into its window, and is done when wait_split returns.
template <class T>
CFPO_DEVICE const char* fetch_split(const Segment<const T>& segment, hw::Policy policy) {
  char* window = hw::shared_memory() + warp_index() * kWindowBytes;
  fetch_segment(window, segment, policy);
  return window;
}
CFPO_DEVICE void wait_split() {
  hw::wait_copies(0);
  hw::sync_warp();
}

// The row's.
template <bool kEntropy>
CFPO_DEVICE SegmentSum<kEntropy>* split_parts(const SplitWorkspace& workspace, int row,
                                              int n_segments) {
  return reinterpret_cast<SegmentSum<kEntropy>*>(workspace.parts) +
         static_cast<std::int64_t>(row) * n_segments;
}

// targets[row]: the target's logit; the second kernel may find it overwritten.
template <class T, bool kEntropy>
CFPO_KERNEL(kSplitThreads, 4)
split_sums_kernel(CFPO_ARGUMENT Problem problem, CFPO_ARGUMENT SplitWorkspace workspace) {
  const Rows& logits = problem.logits;
  const int row = static_cast<int>(hw::block_index());
  const int n_segments = count_segments(logits.n_cols, logits.dtype);
  const int index = split_segment();
  if (index >= n_segments || problem.weights[row] == 0.0f) return;

  const T* x = static_cast<const T*>(logits.row(row));
  const Segment<const T> segment(x, logits.n_cols, index);
  const char* window = fetch_split(segment, hw::read_again());
  const std::int64_t column = problem.column(row);
  if (index == 0 && lane_index() == 0) {
    workspace.targets[row] = column >= 0 ? load_element(x + column) : problem.absent_logit();
  }
  wait_split();
  const SegmentSum<kEntropy> part = sum_segment<T, kEntropy>(
      window, segment, column_in_segment<T>(column, index), row_scale(problem, row));
  if (lane_index() == 0) split_parts<kEntropy>(workspace, row, n_segments)[index] = part;
}

// What the blocks of the second kernel keep behind their windows.
struct SplitShared {
  MergedRow merged;
  PeakedGradient gradient;
};

// Stage 2 by one thread; the first block of a row publishes its scalars.
template <class T, class Stage>
CFPO_DEVICE PeakedGradient split_second_stage(const Stage& stage, int row,
                                              const SplitWorkspace& workspace, int n_segments,
                                              MergedRow* shared) {
  const Problem& problem = stage.p.problem;
  const bool publish = hw::block_index_y() == 0;
  if constexpr (Stage::kSums) {
    const float scale = row_scale(problem, row), target = workspace.targets[row];
    MergedRow merged;
    if (stage.entropy()) {
      merged =
          merge_peaked(split_parts<true>(workspace, row, n_segments), n_segments, scale, target);
    } else {
      merged.sum = merge_plain(split_parts<false>(workspace, row, n_segments), n_segments);
    }
    // From where registers do not have to keep it.
    if (lane_index() == 0) *shared = merged;
    hw::sync_warp();
    if (lane_index() != 0) return {};
    return settle_peaked(stage, row, stats_of(scale, target, *shared, problem.sharded), *shared,
                         publish);
  } else {
    if (lane_index() != 0) return {};
    // Only the block that has the target uses it, and has not overwritten it yet.
    const std::int64_t column = problem.column(row);
    const int warps = hw::block_threads() / kWarpThreads;
    const std::int64_t first =
        static_cast<std::int64_t>(hw::block_index_y()) * warps * kSegmentColumns<T>;
    const bool here = column >= first && column < first + warps * kSegmentColumns<T>;
    const T* x = static_cast<const T*>(problem.logits.row(row));
    return settle_from_lse(stage, row, stage.stats(row, here ? load_element(x + column) : 0.0f));
  }
}

// Three blocks an SM: for four, sm_120 would spill stage 2's registers.
template <class T, class Stage>
CFPO_KERNEL(kSplitThreads, 3)
split_finish_kernel(CFPO_ARGUMENT Stage stage, CFPO_ARGUMENT Rows dlogits,
                    CFPO_ARGUMENT SplitWorkspace workspace) {
  const Rows& logits = stage.p.problem.logits;
  const int row = static_cast<int>(hw::block_index());
  const int n_segments = count_segments(logits.n_cols, logits.dtype);
  const int index = split_segment();
  const bool mine = index < n_segments && dlogits.data != nullptr;
  T* out = mine ? static_cast<T*>(dlogits.row(row)) : nullptr;
  if (stage.skip(row)) {
    if (hw::thread_index() == 0 && hw::block_index_y() == 0) stage.skipped(row);
    if (mine) write_zeros(Segment<T>(out, dlogits.n_cols, index));
    return;
  }

  const T* x = static_cast<const T*>(logits.row(row));
  const char* window = nullptr;
  if (mine) {
    window = fetch_split(Segment<const T>(x, logits.n_cols, index), hw::read_once());
  }
  SplitShared* shared = reinterpret_cast<SplitShared*>(
      hw::shared_memory() + hw::block_threads() / kWarpThreads * kWindowBytes);
  const PeakedGradient& g = shared->gradient;
  if (warp_index() == 0) {
    const PeakedGradient first =
        split_second_stage<T>(stage, row, workspace, n_segments, &shared->merged);
    if (lane_index() == 0) shared->gradient = first;
  }
  hw::wait_copies(0);
  hw::sync_block();
  if (!mine) return;
  const Segment<T> to(out, dlogits.n_cols, index);
  const int target = column_in_segment<T>(stage.p.problem.token_ids[row], index);
  write_gradient<T, true>(window, alignment_shift(x), to, target, g.gradient, slope_of(stage));
  if (Stage::kGradient && (g.segment == index || g.segment == kAnySegment)) {
    write_peak(window, alignment_shift(x), to, target, stage, row, g);
  }
}

constexpr int split_shared_bytes() {
  return kSplitThreads / kWarpThreads * kWindowBytes + static_cast<int>(sizeof(SplitShared));
}

}  // namespace cfpo::cuda
