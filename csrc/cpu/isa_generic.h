// The baseline: 128-bit vectors by compiler extension, which are SSE2 on x86-64 and NEON on
// aarch64. It may assume no fused multiply-add, so x * scale - ref is split differently.
#pragma once

#include <cstring>

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "cpu/segment_kernels.h"

namespace cfpo::cpu {
namespace {

struct Generic {
  typedef float Vec __attribute__((vector_size(16)));
  typedef std::int32_t Int __attribute__((vector_size(16)));
  typedef std::uint32_t Bits __attribute__((vector_size(16)));
  static constexpr int kLanes = 4;

  static CFPO_INLINE Vec set1(float x) { return Vec{x, x, x, x}; }
  static CFPO_INLINE Bits bits(std::uint32_t x) { return Bits{x, x, x, x}; }
  static CFPO_INLINE Vec add(Vec a, Vec b) { return a + b; }
  static CFPO_INLINE Vec mul(Vec a, Vec b) { return a * b; }
  static CFPO_INLINE Vec div(Vec a, Vec b) { return a / b; }
  static CFPO_INLINE Vec select(Int mask, Vec a, Vec b) {
    return (Vec)(((Int)a & mask) | ((Int)b & ~mask));
  }
  static CFPO_INLINE Vec max(Vec a, Vec b) { return select((Int)(a > b), a, b); }
  static CFPO_INLINE Vec min(Vec a, Vec b) { return select((Int)(a < b), a, b); }
  static CFPO_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(__aarch64__)
    return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
  }
  static CFPO_INLINE float horizontal_max(Vec v) {
    float top = v[0];
    for (int k = 1; k < kLanes; ++k) top = v[k] > top ? v[k] : top;
    return top;
  }
  static CFPO_INLINE float horizontal_sum(Vec v) { return (v[0] + v[2]) + (v[1] + v[3]); }

  // x * scale would round at the size of ref: 1e-3 where logits share an offset of 1e4. So
  // u = (x - center) * scale + rest with center = ref / scale, and rest what that rounded away.
  struct Affine {
    Vec scale, center, rest;
    Affine(float s, float ref) : scale(set1(s)), center(set1(ref / s)) {
      rest = set1(static_cast<float>(static_cast<double>(center[0]) * s - ref));
    }
    CFPO_INLINE Vec operator()(Vec x) const { return fma(x - center, scale, rest); }
  };

  template <int kDegree, bool kSaturating>
  struct Exp2 {
    static constexpr float kMagic = 12582912.0f + 127.0f;  // see isa_avx2.h
    Affine affine;
    ScaledPoly<Generic, kDegree> poly;
    Exp2(float scale, float ref, float factor = 1.0f) : affine(scale, ref), poly(factor) {}
    template <int kCount>
    CFPO_INLINE void values(const Vec (&x)[kCount], Vec (&e)[kCount]) const {
      Vec t[kCount], f[kCount];
      for (int k = 0; k < kCount; ++k) {
        Vec u = max(set1(-127.0f), affine(x[k]));
        if (kSaturating) u = min(set1(126.0f), u);
        t[k] = u + set1(kMagic);
        f[k] = u - (t[k] - set1(kMagic));
      }
      poly(f, e);
      for (int k = 0; k < kCount; ++k) e[k] *= (Vec)((Bits)t[k] << 23);
    }
    template <bool kClamps, int kCount>
    CFPO_INLINE void add(const Vec (&x)[kCount], Vec (&sum)[kCount], Vec (&e)[kCount]) const {
      values(x, e);
      for (int k = 0; k < kCount; ++k) sum[k] += e[k];
    }
    CFPO_INLINE Vec exponent(Vec x) const { return max(set1(-127.0f), affine(x)); }
  };
  static constexpr bool kSplits = false, kStreams = false, kHalfLanes = false;

  template <class T>
  static CFPO_INLINE T load(const void* p) {
    T v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }

  static CFPO_INLINE Vec widen(const float* p) { return load<Vec>(p); }
  static CFPO_INLINE Vec widen(const bfloat16* p) {
    return set_bits(Bits{p[0].bits, p[1].bits, p[2].bits, p[3].bits} << 16);
  }
  static CFPO_INLINE Vec widen(const float16* p) {
    return from_half(Bits{p[0].bits, p[1].bits, p[2].bits, p[3].bits});
  }

  static CFPO_INLINE float load1(float x) { return x; }
  static CFPO_INLINE void load2(const float* p, Vec& a, Vec& b) {
    a = load<Vec>(p);
    b = load<Vec>(p + 4);
  }
  template <bool kStream>
  static CFPO_INLINE void store2(float* p, Vec a, Vec b) {
    std::memcpy(p, &a, sizeof a);
    std::memcpy(p + 4, &b, sizeof b);
  }

  // 8 bfloat16 as they lie in 4 little-endian words: even ones in the low halves, odd in the high.
  static CFPO_INLINE float load1(bfloat16 x) { return set_bits(bits(x.bits) << 16)[0]; }
  static CFPO_INLINE void load2(const bfloat16* p, Vec& even, Vec& odd) {
    const Bits words = load<Bits>(p);
    even = set_bits(words << 16);
    odd = set_bits(words & bits(0xFFFF0000u));
  }
  template <bool kStream>
  static CFPO_INLINE void store2(bfloat16* p, Vec even, Vec odd) {
    const Bits words = (round_to_high_half((Bits)even) >> 16) |
                       (round_to_high_half((Bits)odd) & bits(0xFFFF0000u));
    std::memcpy(p, &words, sizeof words);
  }
  static CFPO_INLINE Vec set_bits(Bits b) { return (Vec)b; }
  static CFPO_INLINE Bits round_to_high_half(Bits b) {
    return b + ((b >> 16) & bits(1)) + bits(0x7FFF);
  }

  static CFPO_INLINE float load1(float16 x) { return from_half(bits(x.bits))[0]; }
  static CFPO_INLINE void load2(const float16* p, Vec& even, Vec& odd) {
    const Bits words = load<Bits>(p);
    even = from_half(words & bits(0xFFFFu));
    odd = from_half(words >> 16);
  }
  template <bool kStream>
  static CFPO_INLINE void store2(float16* p, Vec even, Vec odd) {
    const Bits words = to_half((Bits)even) | (to_half((Bits)odd) << 16);
    std::memcpy(p, &words, sizeof words);
  }
  // Subnormals by their integer value, so that a flush-to-zero mode leaves them alone.
  static CFPO_INLINE Vec from_half(Bits h) {
    const Bits sign = (h & bits(0x8000u)) << 16;
    const Bits magnitude = h & bits(0x7FFFu);
    const Bits subnormal = (Bits)(magnitude < bits(0x0400u));
    const Bits special = (Bits)(magnitude >= bits(0x7C00u));  // infinities and NaNs
    const Bits tiny = (Bits)(__builtin_convertvector((Int)magnitude, Vec) * set1(0x1p-24f));
    const Bits normal = (magnitude << 13) + bits(0x38000000u);
    const Bits value = (subnormal & tiny) | (~subnormal & normal);
    return set_bits(value | (special & bits(0x7F800000u)) | sign);
  }
  // To nearest, ties to even, as the F16C instruction does.
  static CFPO_INLINE Bits to_half(Bits b) {
    const Bits sign = (b & bits(0x80000000u)) >> 16;
    const Bits magnitude = b & bits(0x7FFFFFFFu);
    const Bits is_nan = (Bits)(magnitude > bits(0x7F800000u));
    const Bits overflow = (Bits)(magnitude >= bits(0x477FF000u));  // 65520 and above round to inf
    const Bits subnormal = (Bits)(magnitude < bits(0x38800000u));  // below 2^-14
    // Adding 0.5 puts a subnormal's last place at the float's last place: the FPU rounds it.
    const Bits tiny = (Bits)(set_bits(magnitude) + set1(0.5f)) - bits(0x3F000000u);
    const Bits odd = (magnitude >> 13) & bits(1);
    const Bits normal = (magnitude - bits(0x38000000u) + bits(0xFFF) + odd) >> 13;
    Bits h = (subnormal & tiny) | (~subnormal & normal);
    h = (overflow & bits(0x7C00u)) | (~overflow & h);
    return sign | (is_nan & bits(0x7E00u)) | (~is_nan & h);
  }
};

}  // namespace
}  // namespace cfpo::cpu
