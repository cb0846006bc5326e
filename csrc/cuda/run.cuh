// Which kernel runs, with which template arguments and on which grid.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/cluster_kernel.cuh"
#include "cuda/launch.h"
#include "cuda/multiply_kernel.cuh"
#include "cuda/row_kernel.cuh"
#include "cuda/run.h"
#include "cuda/split_kernels.cuh"
#include "cuda/transient_kernel.cuh"

namespace cfpo::cuda {

// Calls run(std::bool_constant) for a flag that a kernel takes as a template argument.
template <class Run>
void with_flag(bool flag, Run run) {
  if (flag) {
    run(std::true_type());
  } else {
    run(std::false_type());
  }
}

// Of a stage that sums, each kernel exists with and without the sums for the entropy; but behind a
// softcap only with them, which change no bit of anything else, and not for clusters.
template <class Stage, bool kEntropy>
constexpr bool kExists = Stage::kSums ? kEntropy || !kCapped<Stage> : !kEntropy;

template <class Stage>
bool with_entropy(const Stage& stage) {
  return Stage::kSums && (kCapped<Stage> || stage.entropy());
}

template <class T, class Stage>
void run_row_kernel(const Stage& stage, const Rows& dlogits, int n_segments,
                    const DeviceLimits& limits, const Execution& execution) {
  const bool both_sweeps = Stage::kSums && dlogits.data != nullptr;
  const RowPlan plan = plan_rows(n_segments, both_sweeps, limits);
  Grid grid;
  grid.blocks = row_blocks(stage.p.problem.logits.n_rows, plan, limits);
  grid.threads = plan.warps() * kWarpThreads;
  grid.shared_bytes = RowSharedMemory(plan).bytes;
  with_flag(with_entropy(stage), [&](auto entropy) {
    if constexpr (kExists<Stage, entropy.value>) {
      launch("row_kernel", row_kernel<T, Stage, entropy.value>, grid, execution, stage, dlogits,
             plan);
    }
  });
}

// Whether the device has room for it.
template <class T, class Stage>
bool run_cluster_kernel(const Stage& stage, const Rows& dlogits, const ClusterPlan& plan,
                        const DeviceLimits& limits, const Execution& execution) {
  Grid grid;
  grid.cluster = plan.cluster;
  grid.threads = (plan.warps + kAccountants) * kWarpThreads;
  grid.shared_bytes = plan.shared.bytes;
  with_flag(with_entropy(stage), [&](auto entropy) {
    if constexpr (kExists<Stage, entropy.value>) {
      const auto kernel = cluster_kernel<T, Stage, entropy.value>;
      const std::int64_t together = clusters_at_once("cluster_kernel", kernel, grid, execution);
      if (!is_room(plan, together, limits)) return;
      grid.blocks = std::min(stage.p.problem.logits.n_rows, together) * plan.cluster;
      launch("cluster_kernel", kernel, grid, execution, stage, dlogits, plan);
    }
  });
  return grid.blocks > 0;
}

// Likewise.
template <class T, class Stage>
bool run_transient_kernel(const Stage& stage, const Rows& dlogits, const TransientPlan& plan,
                          const Execution& execution) {
  Grid grid;
  grid.blocks = stage.p.problem.logits.n_rows * plan.cluster;
  grid.cluster = plan.cluster;
  grid.threads = plan.warps * kWarpThreads;
  grid.shared_bytes = plan.bytes;
  bool room = false;
  with_flag(stage.entropy(), [&](auto entropy) {
    const auto kernel = transient_kernel<T, Stage, entropy.value>;
    room = clusters_at_once("transient_kernel", kernel, grid, execution) > 0;
    if (room) launch("transient_kernel", kernel, grid, execution, stage, dlogits, plan);
  });
  return room;
}

template <class T, class Stage>
void run_split_kernels(const Stage& stage, const Rows& dlogits, int n_segments,
                       const Execution& execution) {
  const Problem& problem = stage.p.problem;
  const std::int64_t n_rows = problem.logits.n_rows;
  const SplitWorkspace workspace = SplitWorkspace::at(execution.workspace, n_rows, n_segments);
  constexpr int kWarps = kSplitThreads / kWarpThreads;
  Grid grid;
  grid.blocks = n_rows;
  grid.blocks_y = (n_segments + kWarps - 1) / kWarps;
  grid.threads = kSplitThreads;
  grid.shared_bytes = split_shared_bytes();
  if constexpr (Stage::kSums) {
    with_flag(with_entropy(stage), [&](auto entropy) {
      if constexpr (kExists<Stage, entropy.value>) {
        launch("split_sums_kernel", split_sums_kernel<T, entropy.value, kCapped<Stage>>, grid,
               execution, problem, workspace);
      }
    });
  }
  if (dlogits.data == nullptr) grid.blocks_y = 1;
  launch("split_finish_kernel", split_finish_kernel<T, Stage>, grid, execution, stage, dlogits,
         workspace);
}

inline void refuse_clusters(const std::string& kernel, const RowSlices& plan) {
  throw std::invalid_argument("CFPO_KERNELS_CUDA_KERNEL is '" + kernel +
                              "', but this device has no room for clusters of " +
                              std::to_string(plan.cluster) + " blocks");
}

template <class T, class Stage>
void run_stage(const Stage& stage, const Rows& dlogits, const Execution& execution) {
  const Rows& logits = stage.p.problem.logits;
  const int n_segments = count_segments(logits.n_cols, logits.dtype);
  const DeviceLimits limits = device_limits(execution.device);
  const RowKernel wanted = execution.row_kernel;
  if constexpr (Stage::kSums && Stage::kGradient) {
    const ClusterPlan plan = plan_clusters(n_segments, limits);
    [[maybe_unused]] const bool chosen =
        dlogits.data != nullptr &&
        use_clusters(logits.n_rows, plan, limits, wanted, kCapped<Stage>);
    if constexpr (!kCapped<Stage>) {  // behind a softcap there are no clusters
      if (chosen && run_cluster_kernel<T>(stage, dlogits, plan, limits, execution)) return;
      if (chosen && wanted == RowKernel::kCluster) refuse_clusters("cluster", plan);
      const TransientPlan transient = plan_transient(n_segments, stage.entropy(), limits);
      if (dlogits.data != nullptr && use_transient(logits.n_rows, transient, limits, wanted)) {
        if (run_transient_kernel<T>(stage, dlogits, transient, execution)) return;
        if (wanted == RowKernel::kTransient) refuse_clusters("transient", transient);
      }
    }
  }
  if (split_rows(logits.n_rows, n_segments, limits)) {
    run_split_kernels<T>(stage, dlogits, n_segments, execution);
  } else {
    run_row_kernel<T>(stage, dlogits, n_segments, limits, execution);
  }
}

template <class T>
void run_multiply(const Rows& rows, const float* factors, std::int64_t factor_stride,
                  const Execution& execution) {
  constexpr std::int64_t kEnoughBlocks = 4096;  // several for each SM of any device
  Grid grid;
  grid.blocks = (rows.n_rows + kMultiplyRows - 1) / kMultiplyRows;
  const std::int64_t slices = std::max<std::int64_t>(1, kEnoughBlocks / grid.blocks);
  grid.blocks_y =
      static_cast<int>(std::min<std::int64_t>(slices, count_segments(rows.n_cols, rows.dtype)));
  grid.threads = kMultiplyThreads;
  launch("multiply_kernel", multiply_kernel<T>, grid, execution, rows, factors, factor_stride);
}

}  // namespace cfpo::cuda
