// AVX2 + FMA + F16C with 256-bit vectors.
//
// Without vscalefps, 2^n is built from integer bits, so the argument is clamped first.
#pragma once

#include <immintrin.h>

#include "cpu/segment_kernels.h"

namespace cfpo::cpu {
namespace {

struct Avx2 {
  using Vec = __m256;
  static constexpr int kLanes = 8;

  static CFPO_INLINE Vec set1(float x) { return _mm256_set1_ps(x); }
  static CFPO_INLINE Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  static CFPO_INLINE Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
  static CFPO_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
  static CFPO_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  static CFPO_INLINE float horizontal_max(Vec v) {
    float lane[kLanes];
    _mm256_storeu_ps(lane, v);
    float top = lane[0];
    for (int k = 1; k < kLanes; ++k) top = lane[k] > top ? lane[k] : top;
    return top;
  }
  static CFPO_INLINE float horizontal_sum(Vec v) {
    float t[kLanes];
    _mm256_storeu_ps(t, v);
    return ((t[0] + t[4]) + (t[1] + t[5])) + ((t[2] + t[6]) + (t[3] + t[7]));
  }

  struct Affine {
    Vec scale, minus_ref;
    Affine(float s, float ref) : scale(set1(s)), minus_ref(set1(-ref)) {}
    CFPO_INLINE Vec operator()(Vec x) const { return fma(x, scale, minus_ref); }
  };

  // Adding 1.5 * 2^23 rounds a float to an integer and leaves it in the low bits of the sum. With
  // 127 added those are a float's exponent field; 0 there makes 2^n zero.
  template <int kDegree, bool kSaturating>
  struct Exp2 {
    static constexpr float kMagic = 12582912.0f + 127.0f;
    Affine affine;
    ScaledPoly<Avx2, kDegree> poly;
    Exp2(float s, float ref, float factor) : affine(s, ref), poly(factor) {}
    CFPO_INLINE Vec operator()(Vec x) const {
      Vec u = _mm256_max_ps(set1(-127.0f), affine(x));  // a NaN passes both clamps
      if (kSaturating) u = _mm256_min_ps(set1(126.0f), u);
      const Vec t = add(u, set1(kMagic));
      const Vec f = _mm256_sub_ps(u, _mm256_sub_ps(t, set1(kMagic)));
      const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(t), 23);
      return mul(poly(f), _mm256_castsi256_ps(exponent));
    }
  };

  static CFPO_INLINE float load1(float x) { return x; }
  static CFPO_INLINE void load2(const float* p, Vec& a, Vec& b) {
    a = _mm256_loadu_ps(p);
    b = _mm256_loadu_ps(p + 8);
  }
  static CFPO_INLINE void store2(float* p, Vec a, Vec b) {
    _mm256_storeu_ps(p, a);
    _mm256_storeu_ps(p + 8, b);
  }

  // 16 bfloat16 as they lie: the even ones in the low halves of 8 words, the odd in the high.
  static CFPO_INLINE float load1(bfloat16 x) {
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(static_cast<int>(x.bits) << 16)));
  }
  static CFPO_INLINE void load2(const bfloat16* p, Vec& even, Vec& odd) {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    even = _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
    odd = _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(0xFFFF0000)));
  }
  // To nearest; ties away from zero, which is one instruction instead of four and no less
  // accurate. A NaN has a zero low half here (plain_nan sees to it) and never carries.
  static CFPO_INLINE void store2(bfloat16* p, Vec even, Vec odd) {
    const __m256i half = _mm256_set1_epi32(0x8000);
    const __m256i low = _mm256_srli_epi32(_mm256_add_epi32(_mm256_castps_si256(even), half), 16);
    const __m256i high = _mm256_add_epi32(_mm256_castps_si256(odd), half);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_blend_epi16(low, high, 0xAA));
  }

  static CFPO_INLINE float load1(float16 x) {
    return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(x.bits)));
  }
  static CFPO_INLINE void load2(const float16* p, Vec& a, Vec& b) {
    a = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    b = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)));
  }
  static CFPO_INLINE void store2(float16* p, Vec a, Vec b) {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, kNearest));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(b, kNearest));
  }
};

}  // namespace
}  // namespace cfpo::cpu
