// Huge pages for outputs of the vocabulary's size.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "core/params.h"

namespace cfpo::cpu {

// A fresh gradient of 100 MB is 30,000 page faults when it is first written, which take longer than
// the kernel itself. Huge pages make that 60. Only asks, and only about whole huge pages inside the
// buffer; memory that is mapped already stays as it is.
inline void prefer_huge_pages(const Rows& rows) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t kHugePage = std::uintptr_t{2} << 20;
  if (rows.data == nullptr || rows.n_rows == 0) return;
  const auto begin = reinterpret_cast<std::uintptr_t>(rows.data);
  const auto end = reinterpret_cast<std::uintptr_t>(rows.row(rows.n_rows - 1)) +
                   rows.n_cols * dtype_size(rows.dtype);
  const std::uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const std::uintptr_t last = end / kHugePage * kHugePage;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)rows;
#endif
}

}  // namespace cfpo::cpu
