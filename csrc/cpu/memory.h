// What the machine does with outputs of the vocabulary's size: huge pages, sizes of caches.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "core/params.h"

namespace cfpo::cpu {

// A fresh gradient of 100 MB is 30,000 page faults when it is first written, which take longer than
// the kernel itself. Huge pages make that 60. Only asks, and only about whole huge pages inside the
// buffer; in place there is no fresh memory.
inline void prefer_huge_pages(const Rows& dlogits, const Rows& logits) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t kHugePage = std::uintptr_t{2} << 20;
  if (dlogits.data == nullptr || dlogits.data == logits.data || dlogits.n_rows == 0) return;
  const auto begin = reinterpret_cast<std::uintptr_t>(dlogits.data);
  const auto end = reinterpret_cast<std::uintptr_t>(dlogits.row(dlogits.n_rows - 1)) +
                   dlogits.n_cols * dtype_size(dlogits.dtype);
  const std::uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const std::uintptr_t last = end / kHugePage * kHugePage;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)dlogits;
  (void)logits;
#endif
}

inline std::int64_t last_level_cache_bytes() {
  static const std::int64_t bytes = [] {
#if defined(_SC_LEVEL3_CACHE_SIZE)
    const long known = sysconf(_SC_LEVEL3_CACHE_SIZE);
    if (known > 0) return static_cast<std::int64_t>(known);
#endif
    return std::int64_t{32} << 20;
  }();
  return bytes;
}

}  // namespace cfpo::cpu
