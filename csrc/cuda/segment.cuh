// What one warp does with one segment of a row: fetch it, sum it, write its gradient.
//
// A segment is 2 KiB of a row, counted from the row's first column. It is the unit of reduction of
// every kernel here: its sums are taken by one warp in one order and merged by segment number, so
// that a row's result depends neither on the kernel that ran, nor on the grid, nor on how the row
// lies in memory. Segments are worked on in *windows* of shared memory, which hold the aligned
// vectors that the segment touches: byte k of it lies at window[shift + k], with shift the row's
// address modulo 16. At either end a window may hold bytes of a neighbour: they are never used.
#pragma once

#include "core/row_math.h"
#include "cuda/elements.cuh"
#include "cuda/logit_map.cuh"
#include "cuda/plan.h"

namespace cfpo::cuda {

constexpr int kLaneVectors = kSegmentBytes / (kWarpThreads * kVectorBytes);
template <class T>
constexpr int kSegmentColumns = kSegmentBytes / static_cast<int>(sizeof(T));

CFPO_DEVICE int lane_index() { return hw::thread_index() % kWarpThreads; }
CFPO_DEVICE int warp_index() { return hw::thread_index() / kWarpThreads; }

template <class T>
CFPO_DEVICE int alignment_shift(const T* p) {
  return static_cast<int>(reinterpret_cast<std::uintptr_t>(p) % kVectorBytes);
}

// One segment of one row; x may be a row of logits or of its gradient.
template <class T>
struct Segment {
  T* begin;   // first column
  int count;  // columns, at most kSegmentColumns
  int shift;  // bytes

  CFPO_DEVICE Segment(T* row, std::int64_t n_cols, int index) {
    const std::int64_t first = static_cast<std::int64_t>(index) * kSegmentColumns<T>;
    const std::int64_t left = n_cols - first;
    begin = row + first;
    count = static_cast<int>(left < kSegmentColumns<T> ? left : kSegmentColumns<T>);
    shift = alignment_shift(row);
  }
};

// The column within segment `index` of a row's column, or -1.
template <class T>
CFPO_DEVICE int column_in_segment(std::int64_t column, int index) {
  const std::int64_t within = column - static_cast<std::int64_t>(index) * kSegmentColumns<T>;
  return within >= 0 && within < kSegmentColumns<T> ? static_cast<int>(within) : -1;
}

// Starts to copy a segment into a window; whole aligned vectors, so neighbours' bytes come along.
template <class T>
CFPO_DEVICE void fetch_segment(char* window, const Segment<const T>& segment, hw::Policy policy) {
  const char* from = reinterpret_cast<const char*>(segment.begin) - segment.shift;
  const int bytes = segment.shift + segment.count * static_cast<int>(sizeof(T));
  for (int i = lane_index() * kVectorBytes; i < bytes; i += kWarpThreads * kVectorBytes) {
    hw::copy_async16(window + i, from + i, policy);
  }
  hw::commit_copies();
}

// Sum over a warp, in the same order in every lane.
template <class Real>
CFPO_DEVICE Real warp_sum(Real x) {
  for (int mask = kWarpThreads / 2; mask > 0; mask /= 2) x += hw::shuffle_xor(x, mask);
  return x;
}

// 0 * -inf would be NaN; 2^-1024 is far below the smallest float.
CFPO_DEVICE float finite_exponent(float u) { return std::fmax(u, -1024.0f); }

// A lane's vectors of the segment in `window`, with -inf for what is not the segment's and for
// column `skip`, the target, which stays out of all sums. A bit for each of these: behind a map
// other elements of -inf count.
template <class T>
CFPO_DEVICE std::uint32_t load_segment(Vector (&raw)[kLaneVectors], const char* window,
                                       const Segment<const T>& segment, int skip) {
  constexpr int kElements = kVectorElements<T>;
  for (int k = 0; k < kLaneVectors; ++k) {
    const int vector = k * kWarpThreads + lane_index();
    raw[k] = load_shifted(window + vector * kVectorBytes, segment.shift);
  }
  std::uint32_t removed = 0;
  if (skip >= 0 || segment.count < kSegmentColumns<T>) {
    for (int k = 0; k < kLaneVectors; ++k) {
      const int first = (k * kWarpThreads + lane_index()) * kElements;
      const int left = segment.count - first, target = skip - first;
      for (int j = 0; j < kElements; ++j) {
        if (j >= left || j == target) {
          remove_element<T>(raw[k], j);
          removed |= 1u << (k * kElements + j);
        }
      }
    }
  }
  return removed;
}

// The warp's largest element; NaNs are passed over.
template <class T>
CFPO_DEVICE float largest_element(const Vector (&raw)[kLaneVectors]) {
  // One chain of comparisons a vector: each waits for the one before. Of 16-bit elements two at
  // once.
  std::uint32_t tops[kLaneVectors];
  for (int k = 0; k < kLaneVectors; ++k) {
    tops[k] = raw[k].word[0];
    for (int j = 1; j < 4; ++j) tops[k] = Element<T>::larger(tops[k], raw[k].word[j]);
  }
  const std::uint32_t top = Element<T>::larger(Element<T>::larger(tops[0], tops[1]),
                                               Element<T>::larger(tops[2], tops[3]));
  float x[4 / sizeof(T)];
  Element<T>::unpack(top, x);
  // Of NaNs alone it is -inf.
  float largest = -INFINITY;
  for (const float element : x) largest = std::fmax(largest, element);
  return hw::warp_max(largest);
}

// Not -inf, also where there is nothing else: -inf - ref has to be -inf. NaNs, which the maximum
// passes over, and +inf make the sum NaN.
CFPO_DEVICE float reference_of(float top, float scale) {
  return std::fmax(std::ceil(top * scale), -kLargestRef);
}

// A lane's sums of its vectors. `map`: see logit_map.cuh; `removed`: what load_segment has
// returned.
struct LaneSum {
  float sum, weighted;
};
template <class T, bool kEntropy, class Map>
CFPO_DEVICE LaneSum sum_vectors(const Vector (&raw)[kLaneVectors], std::uint32_t removed,
                                float scale, float ref, Map map) {
  constexpr int kElements = kVectorElements<T>;
  float sum[kLaneVectors] = {}, weighted[kLaneVectors] = {};
  for (int k = 0; k < kLaneVectors; ++k) {
    float x[kElements];
    unpack<T>(raw[k], x);
    for (int j = 0; j < kElements; ++j) {
      const float u = std::fma(map(x[j]), scale, -ref);
      float e = hw::exp2_approx(u);
      if (Map::kCaps && (removed >> (k * kElements + j) & 1) != 0) e = 0.0f;
      sum[k] += e;
      if (kEntropy) weighted[k] = std::fma(finite_exponent(u), e, weighted[k]);
    }
  }
  return {(sum[0] + sum[1]) + (sum[2] + sum[3]),
          (weighted[0] + weighted[1]) + (weighted[2] + weighted[3])};
}

// The same from the window, without the largest element, `peak`. Few segments come here: what they
// would keep in registers, all would.
template <class T, class Map>
CFPO_DEVICE LaneSum sum_without(float peak, const char* window, const Segment<const T>& segment,
                                int skip, float scale, float ref, Map map) {
  constexpr int kElements = kVectorElements<T>;
  LaneSum rest{0.0f, 0.0f};
#pragma unroll 1
  for (int vector = lane_index(); vector < kLaneVectors * kWarpThreads; vector += kWarpThreads) {
    float x[kElements];
    unpack<T>(load_shifted(window + vector * kVectorBytes, segment.shift), x);
    for (int j = 0; j < kElements; ++j) {
      const int column = vector * kElements + j;
      const bool stays = column < segment.count && column != skip && x[j] != peak;
      const float u = std::fma(stays ? map(x[j]) : -INFINITY, scale, -ref);
      const float e = hw::exp2_approx(u);
      rest.sum += e;
      rest.weighted = std::fma(finite_exponent(u), e, rest.weighted);
    }
  }
  return rest;
}

// The sums of the segment in `window`, in every lane.
template <class T, bool kEntropy, class Map = LogitMap<false>>
CFPO_DEVICE SegmentSum<kEntropy> sum_segment(const char* window, const Segment<const T>& segment,
                                             int skip, float scale, Map map = {}) {
  Vector raw[kLaneVectors];
  const std::uint32_t removed = load_segment(raw, window, segment, skip);
  const float largest = largest_element<T>(raw);
  const bool none = Map::kCaps && segment.count == 1 && skip == 0;
  const float top = none ? -INFINITY : map(largest), ref = reference_of(top, scale);
  LaneSum lane = sum_vectors<T, kEntropy>(raw, removed, scale, ref, map);
  const float sum = warp_sum(lane.sum);
  if constexpr (kEntropy) {
    PeakedPart part{top, sum, 0.0f, sum};
    if (hw::exp2_approx(std::fma(top, scale, -ref)) > 0.875f * sum) {
      lane = sum_without(largest, window, segment, skip, scale, ref, map);
      part.rest = warp_sum(lane.sum);
    }
    part.weighted = warp_sum(lane.weighted);
    return part;
  } else {
    return {ref, sum, 0.0f};
  }
}

CFPO_DEVICE PartialSum of_all(const PartialSum& part, float) { return part; }
CFPO_DEVICE PartialSum of_all(const PeakedPart& part, float scale) {
  const float ref = reference_of(part.top, scale);
  const float u = finite_exponent(std::fma(part.top, scale, -ref));
  return {ref, part.sum, part.weighted + u * (part.sum - part.rest)};
}

// A row's sums from those of its segments, by one warp, in an order that depends on nothing but
// their number; the result in every lane. Without kEntropy `weighted` stays 0.
//
// A lane takes kMergeAtOnce parts at once and has no branch among them, so that their latencies
// overlap: somebody waits for this.
constexpr int kMergeAtOnce = 5;  // 160 segments, as many as a row of 151,936 16-bit logits has

template <bool kEntropy, class Parts>
CFPO_DEVICE RowSum merge_segments(Parts parts, int count, float ref, float scale = 0.0f) {
  constexpr int kStep = kMergeAtOnce * kWarpThreads;
  RowSum row;
  row.ref = ref;
#pragma unroll 1
  for (int first = lane_index(); first < count; first += kStep) {
    for (int k = 0; k < kMergeAtOnce; ++k) {
      const int i = first + k * kWarpThreads;
      const PartialSum part = i < count ? of_all(parts[i], scale) : PartialSum{ref, 0.0f, 0.0f};
      // Differences of references are exact floats unless they are so large that nothing is left.
      const float down = part.ref - ref;
      const double sum = part.sum;
      const double factor = power_of_two(down);
      row.sum += sum * factor;
      if (kEntropy) {
        const double weighted = part.weighted;
        row.weighted += sum == 0.0 ? 0.0 : (weighted + down * sum) * factor;
      }
    }
  }
  row.sum = warp_sum(row.sum);
  if (kEntropy) row.weighted = warp_sum(row.weighted);
  return row;
}
// The largest of one number of each.
template <class Parts, class Number>
CFPO_DEVICE float largest_of(Parts parts, int count, Number number) {
  constexpr int kStep = kMergeAtOnce * kWarpThreads;
  float top = -INFINITY;
#pragma unroll 1
  for (int first = lane_index(); first < count; first += kStep) {
    for (int k = 0; k < kMergeAtOnce; ++k) {
      const int i = first + k * kWarpThreads;
      top = std::fmax(top, i < count ? number(parts[i]) : -INFINITY);
    }
  }
  return hw::warp_max(top);
}

CFPO_DEVICE int shuffle_index(int x, int lane) {
  float bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits = hw::shuffle(bits, lane);
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

template <class Parts>
CFPO_DEVICE RowSum merge_plain(Parts parts, int count) {
  const float ref = largest_of(parts, count, [](const PartialSum& part) { return part.ref; });
  return merge_segments<false>(parts, count, ref);
}

// The same where an entropy is wanted: `sum` has the same bits. `target`: its logit.
template <class Parts, class Logit>
CFPO_DEVICE MergedRow merge_peaked(Parts parts, int count, float scale, Logit target) {
  const float top = largest_of(parts, count, [](const PeakedPart& part) { return part.top; });
  const float ref = reference_of(top, scale);
  MergedRow row;
  row.sum = merge_segments<true>(parts, count, ref, scale);
  // More than of its segment, so that it is a peak there too.
  if (!(hw::exp2_approx(std::fma(top, scale, -ref)) > 0.9375f * static_cast<float>(row.sum.sum))) {
    return row;
  }
  RowSum rest{ref};
  int mine = -1;  // the peak's segment, of its lane
#pragma unroll 1
  for (int i = lane_index(); i < count; i += kWarpThreads) {
    const PeakedPart from = parts[i];
    PartialSum part = of_all(from, scale);
    if (from.top == top) {
      part.sum = from.rest;
      part.weighted = from.weighted;
      mine = i;
    }
    RowSum sum{part.ref, part.sum, part.weighted};
    sum.rebase(ref);
    rest.sum += sum.sum;
    rest.weighted += sum.weighted;
  }
  rest.sum = warp_sum(rest.sum);
  rest.weighted = warp_sum(rest.weighted);
  const int at = shuffle_index(mine, hw::lowest_bit(hw::ballot(mine >= 0)));
  row.peak = peak_of(scale, target, {rest, top, at}, ref);
  return row;
}

// Stage 2, by one thread, of a row that was summed for an entropy, in two parts.
template <class Logit>
CFPO_DEVICE RowStats stats_of(float scale, Logit target, const MergedRow& merged, bool sharded) {
  RowStats stats = join_target(scale, target, merged.sum, sharded);
  if (merged.peak.at >= 0 && stats.sum > 0.0) merged.peak.apply(stats);
  return stats;
}
// `inputs`: what a stage takes besides, or nothing.
template <class Stage, class... Inputs>
CFPO_DEVICE PeakedGradient settle_peaked(const Stage& stage, int row, const RowStats& stats,
                                         const MergedRow& merged, bool publish,
                                         const Inputs&... inputs) {
  const RowDerivatives d = stage.derivatives(row, inputs..., stats, publish);
  PeakedGradient g;
  if constexpr (Stage::kGradient) {
    g.gradient = row_gradient(stats, d);
    if (merged.peak.at >= 0 && stats.sum > 0.0) {
      g.segment = static_cast<int>(merged.peak.at);
      g.logit = merged.peak.logit;
      g.value = peak_gradient(stats.scale, merged.peak, d);
    }
  }
  return g;
}
// Of one whose sums another call has left, as its lse:
template <class Stage>
CFPO_DEVICE PeakedGradient settle_from_lse(const Stage& stage, int row, const RowStats& stats) {
  PeakedGradient g{stage(row, stats)};
  if (stage.may_peak(row)) {
    g.segment = kAnySegment;
    g.logit = stage.least_peak(row);
  }
  return g;
}

CFPO_DEVICE const RowGradient& without_peak(const RowGradient& g) { return g; }
CFPO_DEVICE const RowGradient& without_peak(const PeakedGradient& g) { return g.gradient; }

// Writes a segment's worth of a row by whole aligned vectors and, at either end, by elements.
// value(first, x) sets x[0 .. kVectorElements) for the columns from `first`; value(column) is one.
template <class T, class Vectors, class Element>
CFPO_DEVICE void write_segment(const Segment<T>& out, Vectors vectors, Element element) {
  constexpr int kElements = kVectorElements<T>;
  const int before = (kVectorBytes - out.shift) % kVectorBytes / static_cast<int>(sizeof(T));
  const int head = before < out.count ? before : out.count;
  const int whole = (out.count - head) / kElements;
  const int tail = head + whole * kElements;
#pragma unroll
  for (int k = 0; k < kLaneVectors; ++k) {
    const int vector = k * kWarpThreads + lane_index();
    if (vector < whole) {
      const int column = head + vector * kElements;
      float x[kElements];
      vectors(column, x);
      hw::store_streaming(out.begin + column, pack<T>(x));
    }
  }
  const int ragged = head + out.count - tail;
  if (lane_index() < ragged) {
    const int column = lane_index() < head ? lane_index() : tail + lane_index() - head;
    store_element(out.begin + column, element(column));
  }
}

template <bool kLinear>
CFPO_DEVICE float gradient_element(float x, const GradientCoefs& coefs) {
  const float u = std::fma(x, coefs.scale, -coefs.ref);
  const float e = hw::exp2_approx(u);
  if (!kLinear) return e * coefs.constant;
  return e * std::fma(coefs.linear, finite_exponent(u), coefs.constant);
}

// Of a column with element x; `map`: see logit_map.cuh.
template <bool kLinear, class Map = LogitMap<false>>
CFPO_DEVICE float gradient_at(float x, int column, int target, const RowGradient& g, Map map = {}) {
  const float y = map(x);
  return (column == target ? g.target : gradient_element<kLinear>(y, g.coefs)) * map.slope(y);
}

// x: elements of the columns from `column`, which become their gradients.
template <class T, bool kLinear, class Map = LogitMap<false>>
CFPO_DEVICE void gradient_vector(float* x, int column, int target, const RowGradient& g,
                                 Map map = {}) {
  float slopes[kVectorElements<T>];
  for (int j = 0; j < kVectorElements<T>; ++j) {
    x[j] = map(x[j]);
    slopes[j] = map.slope(x[j]);
  }
  for (int j = 0; j < kVectorElements<T>; ++j) x[j] = gradient_element<kLinear>(x[j], g.coefs);
  if (target >= column && target < column + kVectorElements<T>) {
    for (int j = 0; j < kVectorElements<T>; ++j) {
      if (column + j == target) x[j] = g.target;
    }
  }
  for (int j = 0; j < kVectorElements<T>; ++j) x[j] *= slopes[j];
}

// The gradient of the segment in `window`. `shift` is that of the logits, which may differ from
// that of `out`; `target`: the column that gets g.target; kLinear may be false where
// g.coefs.linear is 0.
template <class T, bool kLinear, class Map = LogitMap<false>>
CFPO_DEVICE void write_gradient(const char* window, int shift, const Segment<T>& out, int target,
                                const RowGradient& g, Map map = {}) {
  write_segment(
      out,
      [&](int column, float* x) {
        const int byte = shift + column * static_cast<int>(sizeof(T));
        const int within = byte % kVectorBytes;
        unpack<T>(load_shifted(window + (byte - within), within), x);
        gradient_vector<T, kLinear>(x, column, target, g, map);
      },
      [&](int column) {
        const T* x = reinterpret_cast<const T*>(window + shift) + column;
        return gradient_at<kLinear>(load_shared_element(x), column, target, g, map);
      });
}

// The row's peak, in the lane that has found it.
struct LanePeak {
  int column = -1;
  float logit = 0.0f;

  // Looks among the logits of the columns from `first`, of which there are `count`.
  template <class T>
  CFPO_DEVICE void look(const Vector& v, int first, int count, int target, float least) {
    float x[kVectorElements<T>];
    unpack<T>(v, x);
    for (int j = 0; j < kVectorElements<T>; ++j) {
      const int at = first + j;
      if (x[j] >= least && at < count && at != target) {
        column = at;
        logit = x[j];
      }
    }
  }
  template <class Stage>
  CFPO_DEVICE float value(const Stage& stage, int row, const PeakedGradient& g) {
    float value = g.value;
    if constexpr (!Stage::kSums) {
      const Peak peak = stage.peak(row, logit, column);
      if (peak.at < 0) column = -1;
      value = stage.peak_gradient(row, peak);
    }
    return value * map_of(stage).slope(logit);
  }
};

// Writes it over what write_gradient has left there.
template <class T, class Stage>
CFPO_DEVICE void write_peak(const char* window, int shift, const Segment<T>& out, int target,
                            const Stage& stage, int row, const PeakedGradient& g) {
  LanePeak peak;
  const T* const columns = reinterpret_cast<const T*>(window + shift);
  const auto map = map_of(stage);
#pragma unroll 1
  for (int column = lane_index(); column < out.count; column += kWarpThreads) {
    const float x = map(load_shared_element(columns + column));
    if (x >= g.logit && column != target) peak = {column, x};
  }
  hw::sync_warp();  // another lane has written there
  if (peak.column < 0) return;
  const float value = peak.value(stage, row, g);
  if (peak.column >= 0) store_element(out.begin + peak.column, value);
}

template <class T>
CFPO_DEVICE void write_zeros(const Segment<T>& out) {
  write_segment(
      out,
      [](int, float* x) {
        for (int j = 0; j < kVectorElements<T>; ++j) x[j] = 0.0f;
      },
      [](int) { return 0.0f; });
}

}  // namespace cfpo::cuda
