// AVX-512 (F, BW, DQ, VL) with 512-bit vectors; 2^n by vscalefps, which needs no clamps.
#pragma once

#include <immintrin.h>

#include "cpu/segment_kernels.h"

namespace cfpo::cpu {
namespace {

struct Avx512 {
  using Vec = __m512;
  static constexpr int kLanes = 16;

  static CFPO_INLINE Vec set1(float x) { return _mm512_set1_ps(x); }
  static CFPO_INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static CFPO_INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
  static CFPO_INLINE Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
  static CFPO_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
  static CFPO_INLINE Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
  static CFPO_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  static CFPO_INLINE float horizontal_max(Vec v) { return _mm512_reduce_max_ps(v); }
  static CFPO_INLINE float horizontal_sum(Vec v) { return _mm512_reduce_add_ps(v); }

  struct Affine {
    Vec scale, minus_ref;
    Affine(float s, float ref) : scale(set1(s)), minus_ref(set1(-ref)) {}
    CFPO_INLINE Vec operator()(Vec x) const { return fma(x, scale, minus_ref); }
  };

  template <int kDegree, bool kSaturating>
  struct Exp2 {
    Affine affine;
    ScaledPoly<Avx512, kDegree> poly;
    Exp2(float scale, float ref, float factor = 1.0f) : affine(scale, ref), poly(factor) {}
    template <int kCount>
    CFPO_INLINE void values(const Vec (&x)[kCount], Vec (&e)[kCount]) const {
      Vec n[kCount], f[kCount];
      for (int k = 0; k < kCount; ++k) {
        const Vec u = affine(x[k]);
        n[k] = _mm512_roundscale_ps(u, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        f[k] = _mm512_sub_ps(u, n[k]);
      }
      poly(f, e);
      // At u = -inf the polynomial is NaN, but vscalefps(NaN, -inf) is defined as 0, and
      // vscalefps(NaN, +inf) as +inf; only a NaN exponent gives a NaN.
      for (int k = 0; k < kCount; ++k) e[k] = _mm512_scalef_ps(e[k], n[k]);
    }
    template <bool kClamps, int kCount>
    CFPO_INLINE void add(const Vec (&x)[kCount], Vec (&sum)[kCount], Vec (&e)[kCount]) const {
      values(x, e);
      for (int k = 0; k < kCount; ++k) sum[k] = Avx512::add(sum[k], e[k]);
    }
    CFPO_INLINE Vec exponent(Vec x) const { return max(set1(-1024.0f), affine(x)); }
  };
  // Two fmas and integers in place of vscalefps were slower: the instructions that take the
  // busiest ports are as many, and clamps come on top.
  static constexpr bool kSplits = false;

  static constexpr bool kStreams = true;
  static void finish_streaming() { _mm_sfence(); }
  template <bool kStream>
  static CFPO_INLINE void store(void* p, __m512i bits) {
    if (kStream) {
      _mm512_stream_si512(static_cast<__m512i*>(p), bits);
    } else {
      _mm512_storeu_si512(p, bits);
    }
  }

  // 16-bit lanes, for bf16_gradient.h.
  static constexpr bool kHalfLanes = true;
  static constexpr __mmask32 kOdd = 0xAAAAAAAA;
  using Int = __m512i;
  static CFPO_INLINE Int set16(int x) { return _mm512_set1_epi16(static_cast<short>(x)); }
  static CFPO_INLINE Int load(const void* p) { return _mm512_loadu_si512(p); }
  static CFPO_INLINE Int to_int(Vec x) { return _mm512_cvtps_epi32(x); }
  static CFPO_INLINE Int low_halves(Int even, Int odd) {
    return _mm512_mask_blend_epi16(kOdd, even, _mm512_slli_epi32(odd, 16));
  }
  static CFPO_INLINE Int high_halves(Int even, Int odd) {
    return _mm512_mask_blend_epi16(kOdd, _mm512_srli_epi32(even, 16), odd);
  }
  static CFPO_INLINE Int add16(Int a, Int b) { return _mm512_add_epi16(a, b); }
  static CFPO_INLINE Int mul_high(Int a, Int b) { return _mm512_mulhi_epu16(a, b); }
  static CFPO_INLINE Int mul_high_rounded(Int a, Int b) { return _mm512_mulhrs_epi16(a, b); }
  static CFPO_INLINE Int shift_left7(Int a) { return _mm512_slli_epi16(a, 7); }
  // a + b where n > floor, else 0
  static CFPO_INLINE Int add16_above(Int n, Int floor, Int a, Int b) {
    return _mm512_maskz_add_epi16(_mm512_cmpgt_epi16_mask(n, floor), a, b);
  }

  static CFPO_INLINE Vec widen(const float* p) { return _mm512_loadu_ps(p); }
  static CFPO_INLINE Vec widen(const bfloat16* p) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  }
  static CFPO_INLINE Vec widen(const float16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }

  static CFPO_INLINE float load1(float x) { return x; }
  static CFPO_INLINE void load2(const float* p, Vec& a, Vec& b) {
    a = _mm512_loadu_ps(p);
    b = _mm512_loadu_ps(p + 16);
  }
  template <bool kStream>
  static CFPO_INLINE void store2(float* p, Vec a, Vec b) {
    store<kStream>(p, _mm512_castps_si512(a));
    store<kStream>(p + 16, _mm512_castps_si512(b));
  }

  // 32 bfloat16 as they lie: the even ones in the low halves of 16 words, the odd in the high.
  static CFPO_INLINE float load1(bfloat16 x) {
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(static_cast<int>(x.bits) << 16)));
  }
  static CFPO_INLINE void load2(const bfloat16* p, Vec& even, Vec& odd) {
    const __m512i words = _mm512_loadu_si512(p);
    even = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
    odd = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(0xFFFF0000)));
  }
  template <bool kStream>
  static CFPO_INLINE void store2(bfloat16* p, Vec even, Vec odd) {
#if defined(__AVX512BF16__)
    const __m512i interleave =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                         23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i pairs = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
    store<kStream>(p, _mm512_permutexvar_epi16(interleave, pairs));
#else
    const __m512i low = _mm512_srli_epi32(round_to_high_half(even), 16);
    store<kStream>(p, _mm512_mask_blend_epi16(kOdd, low, round_to_high_half(odd)));
#endif
  }
  // To nearest, ties to even. A NaN has a zero low half here (plain_nan sees to it) and never
  // carries out of its mantissa.
  static CFPO_INLINE __m512i round_to_high_half(Vec v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i lsb = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(bits, _mm512_add_epi32(lsb, _mm512_set1_epi32(0x7FFF)));
  }

  static CFPO_INLINE float load1(float16 x) {
    return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(x.bits)));
  }
  static CFPO_INLINE void load2(const float16* p, Vec& a, Vec& b) {
    a = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    b = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16)));
  }
  template <bool kStream>
  static CFPO_INLINE void store2(float16* p, Vec a, Vec b) {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a, kNearest));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 16), _mm512_cvtps_ph(b, kNearest));
  }
};
}  // namespace
}  // namespace cfpo::cpu
