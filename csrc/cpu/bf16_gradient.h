// The gradient of bfloat16 rows on 16-bit lanes: twice the elements a vector, and no rounding at
// the end. Included by segment_kernels.h, whose rules hold here too.
//
// With y = 65536 (u + log2 |constant| + 127), one fma and one conversion to an integer, the high
// half of y is the exponent field of the result |constant| 2^u and the low half the fraction F of
// its logarithm: its mantissa is 2^F - 1. That is a polynomial by multiplications that keep the
// high half; the largest error of a result is 3e-5, a hundredth of what rounding to bfloat16 costs.
// A negative constant adds 256 to the exponent field, which is the sign bit.
//
// Beside what segment_kernels.h asks for, an Isa provides Int (lanes of 16 bits), set16, load,
// store, to_int, low_halves, high_halves, add16, mul_high, mul_high_rounded, shift_left7,
// add16_above.
#pragma once

#include <cmath>

#include "cpu/isa.h"
#include "cpu/segment_ops.h"

namespace cfpo::cpu {
namespace {

// kVanishing: results may be below 2^-126, and are 0 then.
template <class Isa, bool kVanishing>
struct Bf16Gradient {
  using Vec = typename Isa::Vec;
  using Int = typename Isa::Int;
  static constexpr float kUnit = 65536.0f;
  Vec scale, offset;
  Int zero_field;  // results with this exponent field or a smaller one are 0

  // Where float32 still resolves y, and the exponent field can neither overflow nor reach the sign.
  // False for a constant of 0 or NaN.
  static bool fits(const GradientCoefs& coefs) {
    const double log_size = log_of(coefs), level = log_size - coefs.ref;
    return log_size < 100.0 && level > -500.0 && level < 500.0;
  }
  // Also where no result of elements from `least` on vanishes; that takes two instructions less.
  static bool fits(const GradientCoefs& coefs, float least) {
    static_assert(!kVanishing);
    return log_of(coefs) - coefs.ref + static_cast<double>(least) * coefs.scale > -125.9;
  }
  explicit Bf16Gradient(const GradientCoefs& coefs) {
    const int sign = coefs.constant < 0.0f ? 256 : 0;
    scale = Isa::set1(kUnit * coefs.scale);
    offset = Isa::set1(static_cast<float>(kUnit * (log_of(coefs) - coefs.ref + (127 + sign))));
    zero_field = Isa::set16(sign);
  }

  template <bool kStream>
  CFPO_INLINE void write(const bfloat16* in, bfloat16* to) const {
    constexpr int kLanes = 2 * Isa::kLanes, kCount = kBlock<Isa, bfloat16> / kLanes;
    Int fraction[kCount], field[kCount], p[kCount];
#pragma GCC unroll 4
    for (int k = 0; k < kCount; ++k) {
      Vec even, odd;
      Isa::load2(in + k * kLanes, even, odd);
      const Int e = Isa::to_int(Isa::fma(even, scale, offset));
      const Int o = Isa::to_int(Isa::fma(odd, scale, offset));
      fraction[k] = Isa::low_halves(e, o);
      field[k] = Isa::high_halves(e, o);
      p[k] = Isa::set16(kPoly[3]);
    }
#pragma GCC unroll 4
    for (int i = 2; i >= 0; --i) {
#pragma GCC unroll 4
      for (int k = 0; k < kCount; ++k) {
        p[k] = Isa::add16(Isa::mul_high(fraction[k], p[k]), Isa::set16(kPoly[i]));
      }
    }
#pragma GCC unroll 4
    for (int k = 0; k < kCount; ++k) {
      // To 7 bits, nearest; 2^F that rounds to 2 carries into the field.
      p[k] = Isa::mul_high_rounded(Isa::mul_high(fraction[k], p[k]), Isa::set16(128));
      const Int shifted = Isa::shift_left7(field[k]);
      p[k] = kVanishing ? Isa::add16_above(field[k], zero_field, shifted, p[k])
                        : Isa::add16(shifted, p[k]);
      Isa::template store<kStream>(to + k * kLanes, p[k]);
    }
  }

 private:
  // 2^F - 1 = F (c1 + F (c2 + F (c3 + F c4))), F and the result in units of 2^-16 and 2^-15; fitted
  // over all fractions in this arithmetic.
  static constexpr int kPoly[] = {22714, 7903, 1707, 446};

  static double log_of(const GradientCoefs& coefs) {
    return ::log2(static_cast<double>(__builtin_fabsf(coefs.constant)));
  }
};

}  // namespace
}  // namespace cfpo::cpu
