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
#include "cuda/capped.h"
#include "cuda/elements.cuh"
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

// The segment's sums in every lane. `skip`: the column of the target, which stays out; `map`: see
// capped.h.
template <class T, bool kEntropy, class Map = LogitMap<false>>
CFPO_DEVICE PartialSum sum_segment(const char* window, const Segment<const T>& segment, int skip,
                                   float scale, Map map = {}) {
  constexpr int kElements = kVectorElements<T>;
  Vector raw[kLaneVectors];
  for (int k = 0; k < kLaneVectors; ++k) {
    const int vector = k * kWarpThreads + lane_index();
    raw[k] = load_shifted(window + vector * kVectorBytes, segment.shift);
  }
  std::uint32_t removed = 0;  // a bit for each element; -inf may be one that counts behind a map
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

  float top = -INFINITY;
  for (int k = 0; k < kLaneVectors; ++k) {
    float x[kElements];
    unpack<T>(raw[k], x);
    for (int j = 0; j < kElements; ++j) top = std::fmax(top, x[j]);
  }
  // Not -inf, also where there is nothing else: -inf - ref has to be -inf. NaNs, which the maximum
  // passes over, and +inf make the sum NaN.
  const float ref = std::fmax(std::ceil(map(hw::warp_max(top)) * scale), -kLargestRef);

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
  PartialSum part{ref, warp_sum((sum[0] + sum[1]) + (sum[2] + sum[3])), 0.0f};
  if (kEntropy) part.weighted = warp_sum((weighted[0] + weighted[1]) + (weighted[2] + weighted[3]));
  return part;
}

// A row's sums from those of its segments, by one warp, in an order that depends on nothing but
// their number; the result in every lane.
template <class Parts>
CFPO_DEVICE RowSum merge_segments(Parts parts, int count) {
  float top = -INFINITY;
  for (int i = lane_index(); i < count; i += kWarpThreads) top = std::fmax(top, parts[i].ref);
  RowSum row;
  row.ref = hw::warp_max(top);
  for (int i = lane_index(); i < count; i += kWarpThreads) {
    RowSum part{parts[i].ref, parts[i].sum, parts[i].weighted};
    part.rebase(row.ref);
    row.sum += part.sum;
    row.weighted += part.weighted;
  }
  row.sum = warp_sum(row.sum);
  row.weighted = warp_sum(row.weighted);
  return row;
}

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

// Of a column with element x; `map`: see capped.h.
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
