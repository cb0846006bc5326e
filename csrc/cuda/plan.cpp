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
constexpr int kMostCluster = 16;
// Of a slice, 64 KiB: beside it a row that is summed and one that comes in.
constexpr int kMostSlice = 32;
// One row to write, one to sum, one that comes in, which waits for the gradient of the row before
// the last to leave its slot. From a fourth on, a row can come in during all of that.
constexpr int kLeastSlots = 3;
constexpr int kEnoughSlots = 4;
constexpr int kMostSlots = 5;
constexpr int kMinClusterSegments = 25;  // shorter rows: the row kernel takes several at a time
// Of a transient cluster: so short that six blocks of as many rows share an SM.
constexpr int kShortSlice = 16;
constexpr std::int64_t kMostGridX = 0x7FFFFFFF;

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
  shared.inputs = shared.sums + 2 * (plan.n_segments + 1) * int{sizeof(PeakedPart)};
  shared.barriers = shared.inputs + kClusterNotes * kClusterInputs;
  shared.notes = shared.barriers + (6 + plan.slots) * 8;
  shared.gradients = shared.notes + kClusterNotes * int{sizeof(ClusterRow)};
  shared.bytes = shared.gradients + 2 * int{sizeof(PeakedGradient)};
  return shared;
}

// True, or std::invalid_argument.
bool must_work(const std::string& kernel, const RowSlices& plan, const DeviceLimits& limits) {
  if (limits.clusters && plan.cluster > 0) return true;
  throw std::invalid_argument("CFPO_KERNELS_CUDA_KERNEL is '" + kernel + "', but " +
                              std::string(limits.clusters
                                              ? "a row is too long for that kernel"
                                              : "this device or this build has no clusters"));
}

// Whether there is a slice for every SM, of rows that are long enough.
bool suits(std::int64_t n_rows, const RowSlices& plan, const DeviceLimits& limits) {
  return limits.clusters && plan.cluster > 0 && plan.n_segments >= kMinClusterSegments &&
         n_rows * plan.cluster >= limits.sm_count;
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
  ClusterPlan best;
  ClusterPlan plan;
  plan.n_segments = n_segments;
  for (plan.cluster = 1; plan.cluster <= kMostCluster; plan.cluster *= 2) {
    if (best.slots >= kEnoughSlots || (best.slots > 0 && !plan.portable())) break;
    if (plan.slice_segments() > kMostSlice || n_segments < plan.cluster) continue;
    for (plan.slots = kMostSlots; plan.slots >= kLeastSlots; --plan.slots) {
      plan.shared = cluster_shared_memory(plan);
      if (plan.shared.bytes > limits.shared_per_block) continue;
      // Each has a segment in every block: that keeps workers within a row of each other.
      plan.warps = std::min(n_segments / plan.cluster, kClusterThreads / 32 - kAccountants);
      if (plan.slots > best.slots) best = plan;
      break;
    }
  }
  return best;
}

bool is_room(const ClusterPlan& plan, std::int64_t together, const DeviceLimits& limits) {
  if (plan.portable()) return together > 0;
  return 4 * together * plan.cluster >= 3 * limits.sm_count;
}

TransientPlan plan_transient(int n_segments, bool entropy, const DeviceLimits& limits) {
  const int most = transient_threads(entropy);
  TransientPlan plan;
  plan.n_segments = n_segments;
  for (plan.cluster = 1; plan.cluster <= kPortableCluster; plan.cluster *= 2) {
    if (plan.slice_segments() > kShortSlice && plan.cluster < kPortableCluster) continue;
    plan.sums = plan.slice_segments() * kWindowBytes;
    plan.gradient = plan.sums + n_segments * int{sizeof(PeakedPart)};
    plan.barriers = plan.gradient + int{sizeof(SentGradient<true>)};
    plan.bytes = plan.barriers + 2 * 8;
    if (plan.bytes > limits.shared_per_block) continue;
    const int fit = limits.shared_per_sm / (plan.bytes + kReservedPerBlock);
    plan.blocks_per_sm = std::min(fit, 2 * most / 32);
    const int threads = std::min(most, 2 * most / plan.blocks_per_sm);
    plan.warps = std::min(threads / 32, plan.slice_segments());
    return plan;
  }
  return TransientPlan();
}

RowKernel row_kernel(const std::string& name) {
  if (name == "auto") return RowKernel::kAuto;
  if (name == "portable") return RowKernel::kPortable;
  if (name == "cluster") return RowKernel::kCluster;
  if (name == "transient") return RowKernel::kTransient;
  if (name == "auto-transient") return RowKernel::kAutoTransient;
  throw std::invalid_argument("CFPO_KERNELS_CUDA_KERNEL is '" + name +
                              "'; it takes auto, portable, cluster, transient or auto-transient");
}

bool use_clusters(std::int64_t n_rows, const ClusterPlan& plan, const DeviceLimits& limits,
                  RowKernel wanted, bool capped) {
  if (wanted == RowKernel::kCluster && capped) {
    throw std::invalid_argument(
        "CFPO_KERNELS_CUDA_KERNEL is 'cluster', but that kernel takes no logits with a softcap");
  }
  if (wanted == RowKernel::kCluster) return must_work("cluster", plan, limits);
  return wanted == RowKernel::kAuto && !capped && suits(n_rows, plan, limits);
}

bool use_transient(std::int64_t n_rows, const TransientPlan& plan, const DeviceLimits& limits,
                   RowKernel wanted) {
  if (n_rows > kMostGridX / kPortableCluster) return false;
  if (wanted == RowKernel::kTransient) return must_work("transient", plan, limits);
  return wanted == RowKernel::kAutoTransient && suits(n_rows, plan, limits);
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
