// What an instruction-set level offers: the sweeps over a contiguous piece of a row.
//
// Everything else (rows, threads, objective, dtype dispatch) is compiled once, without special
// instructions, in kernels.cpp. Only these functions exist once per instruction set.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/row_types.h"
#include "core/softcap.h"

namespace cfpo::cpu {

struct SegmentSum {
  PartialSum sums;
  // Of sum_weighted: whether one lane of the vectors holds nearly all of the sum, so that the rest
  // of its elements may be lost beside one of them.
  bool peaked;
  float least;  // none of the elements is below; -inf where that is not known
};

struct SegmentOps {
  // Largest element but number `skip`; NaNs may be passed over.
  float (*max)(const void* x, std::int64_t n, std::int64_t skip);
  // First element but number `skip` that equals `value`; -1 if there is none.
  std::int64_t (*find)(const void* x, std::int64_t n, std::int64_t skip, float value);
  // Sums over all elements but number `skip`, which may lie outside [0, n): the row's target, so
  // that 1 - p of a likely token is not what is left of 1 after a subtraction.
  // `ref_hint`: a reference that probably suits; a non-finite one means "find your own".
  // `narrow`: whether to try without clamps, which pays where no element is 2^-126 of the largest.
  // Meanwhile fetches n / 2 elements at `prefetch`, unless null, into the caches; so does
  // `gradient`. Each sweep leaves the memory idle for half of its time.
  using Sum = SegmentSum (*)(const void* x, std::int64_t n, std::int64_t skip, float scale,
                             float ref_hint, bool narrow, const void* prefetch);
  Sum sum;
  Sum sum_weighted;
  // x and out may be the same memory. `least`: what is below may become anything. `stream`: write
  // past the caches.
  void (*gradient)(const void* x, void* out, std::int64_t n, const GradientCoefs& coefs,
                   float least, const void* prefetch, bool stream);
  // What a softcap makes of the elements, for sweeps over float32.
  void (*cap)(const void* x, float* y, std::int64_t n, const Softcap& softcap,
              const void* prefetch);
  // Of elements before the softcap.
  void (*capped_gradient)(const void* x, void* out, std::int64_t n, const GradientCoefs& coefs,
                          const Softcap& softcap, const void* prefetch);
  void (*multiply)(void* x, std::int64_t n, float factor);
  float (*load)(const void* x, std::int64_t i);
  void (*store)(void* x, std::int64_t i, float value);
};

struct Level {
  const char* name;
  SegmentOps ops[3];  // by DType
};

// Each defined in a file compiled with its own flags; present only where the compiler has them.
#if defined(__x86_64__)
extern const Level kLevelAvx512Bf16;
extern const Level kLevelAvx512;
extern const Level kLevelAvx2;
#endif
extern const Level kLevelBaseline;  // SSE2 on x86-64, NEON on aarch64

}  // namespace cfpo::cpu
