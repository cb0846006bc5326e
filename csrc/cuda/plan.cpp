#include "cuda/plan.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace cfpo::cuda {

namespace {

constexpr int kReservedPerBlock = 1024;  // of an SM's shared memory, by the system
constexpr int kPassingWindows = 3;  // of a warp, where rows only pass: two under way, one in use
constexpr int kMinSplitSegments = 32;
constexpr int kMostGridY = 65535;
constexpr int kMostSplitSegments = kMostGridY * (kSplitThreads / 32);
constexpr int kMostCluster = 8;  // more is not portable
// Of a slice, 64 KiB: beside it a row that is summed and one that comes in.
constexpr int kMostSlice = 32;
// One row to write, one to sum, one that comes in; a fourth that comes in hides the latency of the
// third.
constexpr int kLeastSlots = 3;
constexpr int kMostSlots = 5;
constexpr int kMinClusterSegments = 25;  // shorter rows: the row kernel takes several at a time

int windows_that_fit(RowPlan plan, int shared_bytes) {
  plan.windows = plan.extra_windows = 0;
  const int left = shared_bytes - RowSharedMemory(plan).bytes;
  return left <= 0 ? 0 : left / kWindowBytes;
}

// The most blocks on an SM that have `wanted` windows a warp, or nearly the whole row; or one block
// with what there is.
RowPlan fit(RowPlan plan, int wanted, bool both_sweeps, const DeviceLimits& limits) {
  const int threads = plan.warps() * 32;
  for (int blocks = kRowThreadsPerSm / threads; blocks > 0; --blocks) {
    const int shared =
        std::min(limits.shared_per_block, limits.shared_per_sm / blocks - kReservedPerBlock);
    const int windows = std::min(wanted * plan.warps(), windows_that_fit(plan, shared));
    plan.windows = windows / plan.warps();
    plan.extra_windows = windows % plan.warps();
    plan.blocks_per_sm = blocks;
    const bool nearly_whole = 10 * windows >= 9 * plan.n_segments * plan.rows_per_block;
    if (plan.windows == wanted || (both_sweeps && plan.windows > kRing && nearly_whole)) break;
  }
  return plan;
}

RowPlan fit(RowPlan plan, bool both_sweeps, const DeviceLimits& limits) {
  const int each = (plan.n_segments + plan.warps_per_row() - 1) / plan.warps_per_row();
  if (!both_sweeps) return fit(plan, std::min(each, kPassingWindows), both_sweeps, limits);
  if (plan.warps_per_row() == 1) {
    // A short row's successor is fetched beside it, since alone its latency would not be hidden;
    // but two blocks, of which one can wait, are worth more.
    const RowPlan with_successor = fit(plan, 2 * each, both_sweeps, limits);
    if (with_successor.blocks_per_sm > 1) return with_successor;
  }
  return fit(plan, each, both_sweeps, limits);
}

ClusterSharedMemory cluster_shared_memory(const ClusterPlan& plan) {
  ClusterSharedMemory shared;
  shared.slot_bytes = plan.slice_segments() * kSegmentBytes + kLineBytes;
  shared.sums = plan.slots * shared.slot_bytes;
  shared.barriers = shared.sums + 2 * (plan.n_segments + 1) * int{sizeof(PeakedPart)};
  shared.notes = shared.barriers + (6 + plan.slots) * 8;
  shared.gradients = shared.notes + kClusterNotes * int{sizeof(ClusterRow)};
  shared.bytes = shared.gradients + 2 * int{sizeof(PeakedGradient)};
  return shared;
}

bool works(const RowPlan& plan) {
  return plan.windows > kRing || plan.windows * plan.warps_per_row() >= plan.n_segments;
}

}  // namespace

RowPlan plan_rows(int n_segments, bool both_sweeps, const DeviceLimits& limits) {
  RowPlan plan;
  plan.n_segments = n_segments;
  plan.rows_per_block = n_segments <= 4 ? 8 : 1;
  plan.log2_warps_per_row = n_segments <= 4 ? 0 : n_segments <= 24 ? 2 : 3;
  plan = fit(plan, both_sweeps, limits);
  if (n_segments > 24 && both_sweeps && plan.blocks_per_sm == 1) {
    // One row on the SM: more warps to work on it, unless that leaves them too few windows.
    RowPlan wider = plan;
    wider.log2_warps_per_row = 4;
    wider = fit(wider, both_sweeps, limits);
    if (works(wider)) plan = wider;
  }
  if (works(plan)) return plan;
  throw std::invalid_argument("a row of " + std::to_string(n_segments) +
                              " segments is too long for this device's shared memory");
}

std::int64_t row_blocks(std::int64_t n_rows, const RowPlan& plan, const DeviceLimits& limits) {
  const std::int64_t needed = (n_rows + plan.rows_per_block - 1) / plan.rows_per_block;
  return std::min<std::int64_t>(needed, limits.sm_count * plan.blocks_per_sm);
}

ClusterPlan plan_clusters(int n_segments, const DeviceLimits& limits) {
  ClusterPlan plan;
  plan.n_segments = n_segments;
  for (plan.cluster = 1; plan.cluster <= kMostCluster; plan.cluster *= 2) {
    if (plan.slice_segments() > kMostSlice || n_segments < plan.cluster) continue;
    for (plan.slots = kMostSlots; plan.slots >= kLeastSlots; --plan.slots) {
      plan.shared = cluster_shared_memory(plan);
      if (plan.shared.bytes > limits.shared_per_block) continue;
      // Each has a segment in every block: that keeps workers within a row of each other.
      plan.warps = std::min(n_segments / plan.cluster, kClusterThreads / 32 - kAccountants);
      return plan;
    }
  }
  return ClusterPlan();
}

RowKernel row_kernel(const std::string& name) {
  if (name == "auto") return RowKernel::kAuto;
  if (name == "portable") return RowKernel::kPortable;
  if (name == "cluster") return RowKernel::kCluster;
  throw std::invalid_argument("CFPO_KERNELS_CUDA_KERNEL is '" + name +
                              "'; it takes auto, portable or cluster");
}

bool use_clusters(std::int64_t n_rows, const ClusterPlan& plan, const DeviceLimits& limits,
                  RowKernel wanted, bool capped) {
  const bool possible = limits.clusters && plan.cluster > 0 && !capped;
  if (wanted == RowKernel::kCluster && !possible) {
    throw std::invalid_argument("CFPO_KERNELS_CUDA_KERNEL is 'cluster', but " +
                                std::string(!limits.clusters
                                                ? "this device or this build has no clusters"
                                            : capped ? "that kernel takes no logits with a softcap"
                                                     : "a row is too long for that kernel"));
  }
  if (wanted != RowKernel::kAuto) return wanted == RowKernel::kCluster;
  return possible && plan.n_segments >= kMinClusterSegments &&
         n_rows * plan.cluster >= limits.sm_count;
}

bool split_rows(std::int64_t n_rows, int n_segments, const DeviceLimits& limits) {
  return n_segments >= kMinSplitSegments && n_segments <= kMostSplitSegments &&
         2 * n_rows <= limits.sm_count;
}

std::int64_t SplitWorkspace::bytes(std::int64_t n_rows, int n_segments) {
  return n_rows * (n_segments * static_cast<std::int64_t>(sizeof(PeakedPart)) + sizeof(float));
}

SplitWorkspace SplitWorkspace::at(void* memory, std::int64_t n_rows, int n_segments) {
  SplitWorkspace workspace;
  workspace.parts = static_cast<PeakedPart*>(memory);
  workspace.targets = reinterpret_cast<float*>(workspace.parts + n_rows * n_segments);
  return workspace;
}

}  // namespace cfpo::cuda
