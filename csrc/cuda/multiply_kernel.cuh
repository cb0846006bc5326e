// rows[i, :] *= factors[i]. A warp looks at 32 factors at once; where all are 1, that is all it
// does, and no row is touched.
#pragma once

#include "cuda/segment.cuh"

namespace cfpo::cuda {

constexpr int kMultiplyThreads = 256;
constexpr int kMultiplyRows = kMultiplyThreads;  // of a block: one a thread

template <class T>
CFPO_DEVICE void multiply_segment(const Segment<T>& x, float factor) {
  write_segment(
      x,
      [&](int column, float* values) {
        unpack<T>(hw::load_global(x.begin + column), values);
        for (int j = 0; j < kVectorElements<T>; ++j) values[j] *= factor;
      },
      [&](int column) { return load_element(x.begin + column) * factor; });
}

// Block (x, y): rows from x * kMultiplyRows; every block_count_y-th of their segments from y.
template <class T>
CFPO_KERNEL(kMultiplyThreads, 4)
multiply_kernel(CFPO_ARGUMENT Rows rows, const float* factors, const std::int64_t factor_stride) {
  const int first =
      static_cast<int>(hw::block_index()) * kMultiplyRows + warp_index() * kWarpThreads;
  const int own = first + lane_index();
  const float factor = own < rows.n_rows ? factors[own * factor_stride] : 1.0f;
  if (hw::warp_max(factor != 1.0f ? 1.0f : 0.0f) == 0.0f) return;  // NaN is not 1 either

  const int n_segments = count_segments(rows.n_cols, rows.dtype);
  for (int k = 0; k < kWarpThreads; ++k) {
    const float of_row = plain_nan(hw::shuffle(factor, k));
    if (of_row == 1.0f) continue;
    T* x = static_cast<T*>(rows.row(first + k));
    for (int i = hw::block_index_y(); i < n_segments; i += hw::block_count_y()) {
      multiply_segment(Segment<T>(x, rows.n_cols, i), of_row);
    }
  }
}

}  // namespace cfpo::cuda
