// How a call is laid out on a device: pure arithmetic, tested without one.
#pragma once

#include <cstdint>
#include <string>
#include <type_traits>

#include "core/host_device.h"
#include "core/row_math.h"

namespace cfpo::cuda {

// 2 KiB of a row: the unit of work of a warp and of reduction of every kernel; see segment.cuh.
constexpr int kSegmentBytes = 2048;
constexpr int kWindowBytes = kSegmentBytes + 16;
constexpr int kLineBytes = 128;  // of memory

CFPO_HOST_DEVICE inline int count_segments(std::int64_t n_cols, DType dtype) {
  const std::int64_t columns = kSegmentBytes / dtype_size(dtype);
  return static_cast<int>((n_cols + columns - 1) / columns);
}

// Windows that pass segments through which do not fit into shared memory.
constexpr int kRing = 2;
// What the row kernel is compiled for: 96 registers a thread, so that as many threads fit an SM.
// Blocks are smaller.
constexpr int kRowThreadsPerSm = 640;
constexpr int kSplitThreads = 256;
constexpr int kClusterThreads = 512;  // 14 warps that work on the logits, two on the scalars
constexpr int kAccountants = 2;
constexpr int kPortableCluster = 8;  // blocks that every device with clusters takes
constexpr int kClusterInputs = 32;   // bytes: what a row brings to stage 2
constexpr int kClusterNotes = 16;    // power of two; at least 5 more than the slots
// Of a transient block at most; twice as many share an SM. Sums for an entropy take 96 registers a
// thread, the others 64.
CFPO_HOST_DEVICE constexpr int transient_threads(bool entropy) { return entropy ? 320 : 512; }

struct DeviceLimits {
  int sm_count = 0;
  int shared_per_block = 0;  // bytes, opted in
  int shared_per_sm = 0;
  bool clusters = false;  // runs clusters of blocks, and has bulk copies
};

// The row kernel: a block works on rows_per_block rows at a time, each by warps_per_row warps.
struct RowPlan {
  int n_segments = 0;  // of a row
  int log2_warps_per_row = 0;
  int rows_per_block = 0;
  int windows = 0;        // of each warp
  int extra_windows = 0;  // warps, from the first, that have one more
  int blocks_per_sm = 0;

  CFPO_HOST_DEVICE int warps_per_row() const { return 1 << log2_warps_per_row; }
  CFPO_HOST_DEVICE int windows_before(int warp) const {
    return warp * windows + (warp < extra_windows ? warp : extra_windows);
  }
  CFPO_HOST_DEVICE int warps() const { return rows_per_block << log2_warps_per_row; }
};

// What a segment leaves where an entropy is wanted. A peak, an element that has more than 7/8 of
// the sum, stays out of `weighted` and `rest`: beside it, float32 would lose the others.
struct alignas(16) PeakedPart {
  float top;       // the largest logit, which says the reference and what the peak is
  float sum;       // of all
  float weighted;  // as in PartialSum
  float rest;      // `sum` where there is no peak
};
template <bool kEntropy>
using SegmentSum = std::conditional_t<kEntropy, PeakedPart, PartialSum>;

// A row's sums, and its peak, where that has most of the mass: few rows have one. It is where its
// segment is.
struct MergedRow {
  RowSum sum;
  Peak peak;
};

// What stage 3 takes from a row's scalars. The peak's gradient is written like the target's, by
// itself, where a column of its segment but the target has no less than its logit.
constexpr int kAnySegment = -2;  // of a row whose sums another call has left: look there
struct PeakedGradient {
  RowGradient gradient;
  int segment = -1;
  float logit = 0.0f;
  float value = 0.0f;  // but for kAnySegment
};
// Whether there may be a peak is known when a kernel is compiled.
template <bool kPeaks>
using StageGradient = std::conditional_t<kPeaks, PeakedGradient, RowGradient>;

// What a block exchanges about each of its rows.
struct alignas(16) SharedRow {
  MergedRow merged;
  RowStats stats;
  PeakedGradient gradient;
  float target;  // logit
};

// Offsets into the row kernel's shared memory, which begins with the windows.
struct RowSharedMemory {
  int rows;   // SharedRow of each row
  int parts;  // SegmentSum of each row and segment
  int bytes;

  CFPO_HOST_DEVICE explicit RowSharedMemory(const RowPlan& plan) {
    rows = plan.windows_before(plan.warps()) * kWindowBytes;
    parts = rows + plan.rows_per_block * static_cast<int>(sizeof(SharedRow));
    bytes = parts + plan.rows_per_block * plan.n_segments * static_cast<int>(sizeof(PeakedPart));
  }
};

// `both_sweeps`: sums and gradient, so that a row is worth keeping; otherwise it only passes.
RowPlan plan_rows(int n_segments, bool both_sweeps, const DeviceLimits& limits);
std::int64_t row_blocks(std::int64_t n_rows, const RowPlan& plan, const DeviceLimits& limits);

// How a row is cut up for the blocks of a cluster: into slices of whole segments.
struct RowSlices {
  int n_segments = 0;  // of a row
  int cluster = 0;     // blocks; 0: no plan

  // Block `rank` has the segments from first_segment(rank); slices differ by one at most.
  CFPO_HOST_DEVICE int first_segment(int rank) const {
    const int extra = n_segments % cluster;
    return rank * (n_segments / cluster) + (rank < extra ? rank : extra);
  }
  CFPO_HOST_DEVICE int slice_segments() const { return (n_segments + cluster - 1) / cluster; }
};

// Offsets into the cluster kernel's shared memory, which begins with the slots. Sums and gradients
// have two copies: row number % 2 has which.
struct ClusterSharedMemory {
  int slot_bytes = 0;  // whole lines; a slice touches one vector more than it has bytes for
  int sums = 0;        // 2 * (n_segments + 1) SentSums
  int inputs = 0;      // kClusterNotes of kClusterInputs bytes
  int barriers = 0;    // 6, and one for each slot
  int notes = 0;       // kClusterNotes ClusterRows
  int gradients = 0;   // 2 StageGradients
  int bytes = 0;
};

// The cluster kernel: each block of a cluster has a slice of the row, whole segments, in a slot of
// shared memory; as many rows are in flight as there are slots.
struct ClusterPlan : RowSlices {
  int slots = 0;  // of a block
  int warps = 0;  // workers of a block; the accountants come behind them
  ClusterSharedMemory shared;

  bool portable() const { return cluster <= kPortableCluster; }
};

// What the cluster kernel notes of a row that is read.
struct ClusterRow {
  const void* logits;
  void* dlogits;
  int row;      // -1: there are no more
  int token;    // -1: does not exist
  float scale;  // log2(e) / T
};
// What is sent of a segment; its first number alone, of the target: the logit.
struct alignas(16) AlignedSum : PartialSum {};
template <bool kEntropy>
using SentSum = std::conditional_t<kEntropy, PeakedPart, AlignedSum>;

// The smallest cluster that keeps slices short and four rows in flight, or three if none does;
// cluster 0 if none does even that. One that is not portable only where no other will do.
ClusterPlan plan_clusters(int n_segments, const DeviceLimits& limits);

// Whether a device has room for a plan, which runs so many clusters at once. One that is not
// portable needs most of a GPC's SMs and may leave the others idle: not more than a quarter.
bool is_room(const ClusterPlan& plan, std::int64_t together, const DeviceLimits& limits);

// The transient kernel: a cluster for each row, whose blocks have a slice each in windows of shared
// memory, and behind these, by their offsets, what they exchange.
struct TransientPlan : RowSlices {
  int warps = 0;  // of a block
  int blocks_per_sm = 0;
  int sums = 0;      // n_segments SentSums, of the cluster's first block
  int gradient = 0;  // a SentGradient
  int barriers = 0;  // 2
  int bytes = 0;
};
template <bool kEntropy>
struct alignas(16) SentGradient {
  StageGradient<kEntropy> gradient;
};

// The smallest cluster with slices of at most 32 KiB, or one of eight; cluster 0 where that does
// not fit either.
TransientPlan plan_transient(int n_segments, bool entropy, const DeviceLimits& limits);

// Which kernel sums and writes whole rows: the one that needs no clusters ("portable"), the one of
// clusters that stay ("cluster"), the one of clusters that come and go with their rows
// ("transient"); or the first or the second, whichever suits the row and the device ("auto"); or
// the first or the third ("auto-transient").
enum class RowKernel { kAuto, kPortable, kCluster, kTransient, kAutoTransient };
RowKernel row_kernel(const std::string& name);  // std::invalid_argument for anything else

// Whether the cluster kernel takes these rows; std::invalid_argument if it is wanted and cannot.
// Likewise the transient kernel. `capped`: they are behind a softcap, which it knows nothing of.
bool use_clusters(std::int64_t n_rows, const ClusterPlan& plan, const DeviceLimits& limits,
                  RowKernel wanted, bool capped);
bool use_transient(std::int64_t n_rows, const TransientPlan& plan, const DeviceLimits& limits,
                   RowKernel wanted);

// Whether to split rows over many blocks, by two kernels instead of one.
bool split_rows(std::int64_t n_rows, int n_segments, const DeviceLimits& limits);

// What the first of these hands to the second: in a workspace, room for the parts, then targets.
struct SplitWorkspace {
  PeakedPart* parts;  // (N, segments), each a SegmentSum
  float* targets;     // (N)
  static std::int64_t bytes(std::int64_t n_rows, int n_segments);
  static SplitWorkspace at(void* memory, std::int64_t n_rows, int n_segments);
};

}  // namespace cfpo::cuda
