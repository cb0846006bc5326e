// What the sweeps ask of an instruction set, and what those are written with.
//
// An Isa provides
//
//   Vec, kLanes, set1, add, mul, div, fma, horizontal_max, horizontal_sum
//   max, min: their second operand where either is NaN
//   load1: one element
//   widen: a vector of elements in their own order
//   load2, store2: two vectors of T at once, in an order of the Isa's choosing; store2<true> past
//     the caches, to aligned memory, where kStreams (not float16)
//   Affine(scale, ref): x -> u = x * scale - ref to within one rounding of the result
//   Exp2<Degree, kSaturating>(scale, ref, factor): on a few vectors side by side
//     values(x, e): e = factor * 2^u by a polynomial of that degree. Exact zeros far below, NaN for
//       NaN; above 2^126 it must stay huge where kSaturating, and may be anything where not
//     add<kClamps>(x, sum, e): adds such values to sums too
//     exponent(x): u, but finite for -inf, where 2^u is 0
//   kSplits: whether there are also
//     SplitExp2<Degree>(scale, ref, factor): values and exponent in fewer instructions, not
//       saturating, only where SplitExp2::fits(scale, ref)
//     SumExp2(scale, ref): add and exponent, as accurate as degree 5, where SumExp2::fits(scale,
//       ref); without kClamps only down to kLeastExponent
//     Guard<T>: load2<kLeast> that remembers; exceeds(limit): whether an element was above, or a
//       positive NaN may have been there; least(): at most the least of those loaded with kLeast,
//       unless there was a NaN
//   kHalfLanes: whether there is what bf16_gradient.h needs
#pragma once

#include <limits>

#define CFPO_INLINE inline __attribute__((always_inline))
#define CFPO_INLINE_LAMBDA __attribute__((always_inline))

namespace cfpo::cpu {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr int kCacheLine = 64;
// Of a sum whose exponential does not saturate: beyond, but far below where it goes wrong.
constexpr float kGuardedExponent = 120.0f;
// Of a sum whose exponential is not clamped: where powers of two are still normal.
constexpr float kLeastExponent = -126.0f;

// Relative minimax polynomials for 2^f on [-1/2, 1/2]; degree 3: on [-1/16, 1/16].
template <int Degree>
struct Exp2Poly;
template <>
struct Exp2Poly<3> {  // 2.5e-8
  static constexpr float c[] = {1.0f, 6.931472143e-1f, 2.402576298e-1f, 5.549622180e-2f};
};
template <>
struct Exp2Poly<4> {  // 2.7e-6: a hundredth of float16's rounding, a thousandth of bfloat16's
  static constexpr float c[] = {9.999992847e-1f, 6.931217909e-1f, 2.402474433e-1f, 5.591785908e-2f,
                                9.570102207e-3f};
};
template <>
struct Exp2Poly<5> {  // 2.2e-7: two units in float32's last place
  static constexpr float c[] = {
      1.0f, 6.931469440e-1f, 2.402212024e-1f, 5.550713092e-2f, 9.675540961e-3f, 1.327647245e-3f};
};

// The polynomial times a factor costs nothing: the factor goes into the coefficients.
template <class Isa, int Degree>
struct ScaledPoly {
  typename Isa::Vec c[Degree + 1];

  explicit ScaledPoly(float factor) {
    for (int i = 0; i <= Degree; ++i) c[i] = Isa::set1(Exp2Poly<Degree>::c[i] * factor);
  }
  // Vectors side by side: each is a chain of dependent instructions, and compilers leave them one
  // behind the other.
  template <int kCount>
  CFPO_INLINE void operator()(const typename Isa::Vec (&f)[kCount],
                              typename Isa::Vec (&p)[kCount]) const {
    for (int k = 0; k < kCount; ++k) p[k] = c[Degree];
#pragma GCC unroll 8
    for (int i = Degree - 1; i >= 0; --i) {
#pragma GCC unroll 4
      for (int k = 0; k < kCount; ++k) p[k] = Isa::fma(p[k], f[k], c[i]);
    }
  }
};

// What the sweeps do at a time: two cache lines, or four vectors where those are more.
template <class Isa, class T>
constexpr int kBlock = 2 * kCacheLine / static_cast<int>(sizeof(T)) > 4 * Isa::kLanes
                           ? 2 * kCacheLine / static_cast<int>(sizeof(T))
                           : 4 * Isa::kLanes;

}  // namespace
}  // namespace cfpo::cpu
