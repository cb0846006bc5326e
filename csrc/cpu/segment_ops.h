// What an instruction-set level offers: the sweeps over a contiguous piece of a row.
//
// Everything else (rows, threads, objective, dtype dispatch) is compiled once, without special
// instructions, in kernels.cpp. Only these functions exist once per instruction set.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace cfpo::cpu {

// References beyond this are floats too far apart to be near anything; |logit| / T of 1.5e9.
constexpr float kLargestRef = 2147483648.0f;

// Sums over a segment, with u_v = z_v * scale - ref in units of log2 (scale = log2(e) / T).
// `ref` is an integer, so that partial sums of one row merge by exact powers of two.
struct PartialSum {
  float ref;       // -inf where a search for it found nothing above -inf
  float sum;       // sum_v 2^u_v
  float weighted;  // sum_v u_v 2^u_v, only where entropy is asked for
};

// d_v = 2^u_v * (constant + linear * u_v)
struct GradientCoefs {
  float scale;
  float ref;
  float constant;
  float linear;  // 0 unless the entropy's gradient is wanted
};

struct SegmentOps {
  // Largest element but number `skip`; NaNs may be passed over.
  float (*max)(const void* x, std::int64_t n, std::int64_t skip);
  // Sums over all elements but number `skip`, which may lie outside [0, n): the row's target, so
  // that 1 - p of a likely token is not what is left of 1 after a subtraction.
  // `ref_hint`: a reference that probably suits; a non-finite one means "find your own".
  PartialSum (*sum)(const void* x, std::int64_t n, std::int64_t skip, float scale, float ref_hint);
  PartialSum (*sum_weighted)(const void* x, std::int64_t n, std::int64_t skip, float scale,
                             float ref_hint);
  // x and out may be the same memory. Meanwhile fetches n elements at `prefetch`, unless null,
  // into the L2 cache: this sweep works in cache and leaves the memory idle.
  void (*gradient)(const void* x, void* out, std::int64_t n, const GradientCoefs& coefs,
                   const void* prefetch);
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
