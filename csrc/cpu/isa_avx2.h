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
  static CFPO_INLINE Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
  static CFPO_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
  static CFPO_INLINE Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
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
  static constexpr float kMagic = 12582912.0f + 127.0f;
  static CFPO_INLINE Vec power(Vec magic_sum) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(magic_sum), 23));
  }

  template <int kDegree, bool kSaturating>
  struct Exp2 {
    Affine affine;
    ScaledPoly<Avx2, kDegree> poly;
    Exp2(float s, float ref, float factor = 1.0f) : affine(s, ref), poly(factor) {}
    template <int kCount>
    CFPO_INLINE void values(const Vec (&x)[kCount], Vec (&e)[kCount]) const {
      Vec t[kCount], f[kCount];
      for (int k = 0; k < kCount; ++k) {
        Vec u = _mm256_max_ps(set1(-127.0f), affine(x[k]));  // a NaN passes both clamps
        if (kSaturating) u = _mm256_min_ps(set1(126.0f), u);
        t[k] = Avx2::add(u, set1(kMagic));
        f[k] = _mm256_sub_ps(u, _mm256_sub_ps(t[k], set1(kMagic)));
      }
      poly(f, e);
      for (int k = 0; k < kCount; ++k) e[k] = mul(e[k], power(t[k]));
    }
    template <bool kClamps, int kCount>
    CFPO_INLINE void add(const Vec (&x)[kCount], Vec (&sum)[kCount], Vec (&e)[kCount]) const {
      values(x, e);
      for (int k = 0; k < kCount; ++k) sum[k] = Avx2::add(sum[k], e[k]);
    }
    CFPO_INLINE Vec exponent(Vec x) const { return max(set1(-127.0f), affine(x)); }
  };

  // x -> x * scale - ref as a whole number of units and a rest, by two fmas: t = magic + the whole
  // number, rest = x * scale - (t - magic) with a single rounding. `magic` is 1.5 * 2^23 units,
  // less ref, so that t's low bits count units. x is clamped instead of u: off the chain.
  struct Split {
    Vec scale, magic, lowest, minus_ref;
    Split(float s, float ref, float magic_number)
        : scale(set1(s)),
          magic(set1(magic_number - ref)),
          lowest(set1((ref - 127.0f) / s)),
          minus_ref(set1(-ref)) {}
    // magic - ref has to be a whole number of units, `lowest` to round to 2^-127, and what Guard
    // compares with to be positive; a NaN does not fit.
    static bool fits(float s, float ref) { return ref > -100.0f && ref < 16384.0f && s > 0.0f; }

    template <bool kClamps, int kCount>
    CFPO_INLINE void split(const Vec (&x)[kCount], Vec (&t)[kCount], Vec (&rest)[kCount]) const {
      Vec v[kCount];
      for (int k = 0; k < kCount; ++k) v[k] = kClamps ? max(lowest, x[k]) : x[k];  // a NaN passes
      for (int k = 0; k < kCount; ++k) t[k] = fma(v[k], scale, magic);
      for (int k = 0; k < kCount; ++k) {
        rest[k] = _mm256_fmsub_ps(v[k], scale, _mm256_sub_ps(t[k], magic));
      }
    }
    CFPO_INLINE Vec exponent(Vec x) const { return fma(max(lowest, x), scale, minus_ref); }
  };

  static constexpr bool kSplits = true;
  template <int kDegree>
  struct SplitExp2 {
    Split parts;
    ScaledPoly<Avx2, kDegree> poly;
    SplitExp2(float s, float ref, float factor) : parts(s, ref, kMagic), poly(factor) {}
    static bool fits(float s, float ref) { return Split::fits(s, ref); }

    template <int kCount>
    CFPO_INLINE void values(const Vec (&x)[kCount], Vec (&e)[kCount]) const {
      Vec t[kCount], f[kCount];
      parts.template split<true>(x, t, f);
      poly(f, e);
      for (int k = 0; k < kCount; ++k) e[k] = mul(e[k], power(t[k]));
    }
    CFPO_INLINE Vec exponent(Vec x) const { return parts.exponent(x); }
  };

  // In units of 1/8: 2^(k/8) from a register, and a polynomial of degree 3 for the rest. Fewer
  // instructions on the ports that multiply, which are the busy ones.
  struct SumExp2 {
    static constexpr float kMagicEighths = 1572864.0f + 127.0f;
    Split parts;
    ScaledPoly<Avx2, 3> poly;
    __m256i table;
    SumExp2(float s, float ref) : parts(s, ref, kMagicEighths), poly(1.0f) {
      // The mantissas, less what k itself leaves there when t is shifted to the exponent field.
      alignas(32) static constexpr std::uint32_t kMantissa[] = {
          0x000000, 0x0B95C2, 0x1837F0, 0x25FED7, 0x3504F3, 0x45672A, 0x5744FD, 0x6AC0C7};
      const __m256i k = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
      table = _mm256_sub_epi32(_mm256_load_si256(reinterpret_cast<const __m256i*>(kMantissa)),
                               _mm256_slli_epi32(k, 20));
    }
    static bool fits(float s, float ref) { return Split::fits(s, ref); }

    template <bool kClamps, int kCount>
    CFPO_INLINE void add(const Vec (&x)[kCount], Vec (&sum)[kCount], Vec (&e)[kCount]) const {
      Vec t[kCount], f[kCount], p[kCount], step[kCount];
      parts.template split<kClamps>(x, t, f);
      for (int k = 0; k < kCount; ++k) {
        const __m256i bits = _mm256_castps_si256(t[k]);
        const __m256i mantissa = _mm256_permutevar8x32_epi32(table, bits);  // by the low 3 bits
        step[k] = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_slli_epi32(bits, 20), mantissa));
      }
      poly(f, p);
      for (int k = 0; k < kCount; ++k) {
        sum[k] = fma(p[k], step[k], sum[k]);
        e[k] = mul(p[k], step[k]);
      }
    }
    CFPO_INLINE Vec exponent(Vec x) const { return parts.exponent(x); }
  };

  // The largest bit pattern as a signed integer: that of the largest element, if it is positive.
  // Positive NaNs are above all numbers; negative ones are not seen, and need not be, since they
  // pass through the arithmetic. And the largest as an unsigned integer: that of the least element,
  // if it is negative.
  template <class T>
  struct Guard {
    static constexpr bool kIsFloat = std::is_same_v<T, float>;
    __m256i top = _mm256_set1_epi32(kIsFloat ? 0x80000000 : 0x80008000);
    __m256i bottom = _mm256_setzero_si256();
    template <bool kLeast>
    CFPO_INLINE void see(const T* p) {
      const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
      top = kIsFloat ? _mm256_max_epi32(top, bits) : _mm256_max_epi16(top, bits);
      if (kLeast) {
        bottom = kIsFloat ? _mm256_max_epu32(bottom, bits) : _mm256_max_epu16(bottom, bits);
      }
    }
    template <bool kLeast>
    CFPO_INLINE void load2(const T* p, Vec& a, Vec& b) {
      see<kLeast>(p);
      if (kIsFloat) see<kLeast>(p + 8);
      Avx2::load2(p, a, b);
    }
    float least() const {
      T lane[32 / sizeof(T)];
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(lane), bottom);
      float found = 0.0f;
      for (const T bits : lane) {
        const float value = load1(bits);
        if (value < found) found = value;
      }
      return found;
    }
    bool exceeds(float limit) const {
      T bits[16];
      const __m256i most =
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(all_equal(limit, bits)));
      const __m256i above =
          kIsFloat ? _mm256_cmpgt_epi32(top, most) : _mm256_cmpgt_epi16(top, most);
      return _mm256_movemask_epi8(above) != 0;
    }
  };
  // Rounded down, so that infinity stays above.
  static float* all_equal(float x, float* bits) {
    for (int k = 0; k < 8; ++k) bits[k] = x;
    return bits;
  }
  static bfloat16* all_equal(float x, bfloat16* bits) {
    unsigned word;
    __builtin_memcpy(&word, &x, sizeof word);
    for (int k = 0; k < 16; ++k) bits[k].bits = static_cast<std::uint16_t>(word >> 16);
    return bits;
  }
  static float16* all_equal(float x, float16* bits) {
    constexpr int kDown = _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(bits),
                        _mm256_set1_epi16(static_cast<short>(_cvtss_sh(x, kDown))));
    return bits;
  }

  static constexpr bool kStreams = true;
  static void finish_streaming() { _mm_sfence(); }
  template <bool kStream>
  static CFPO_INLINE void store(void* p, __m256i bits) {
    if (kStream) {
      _mm256_stream_si256(static_cast<__m256i*>(p), bits);
    } else {
      _mm256_storeu_si256(static_cast<__m256i*>(p), bits);
    }
  }

  // 16-bit lanes, for bf16_gradient.h.
  static constexpr bool kHalfLanes = true;
  using Int = __m256i;
  static CFPO_INLINE Int set16(int x) { return _mm256_set1_epi16(static_cast<short>(x)); }
  static CFPO_INLINE Int load(const void* p) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(p));
  }
  static CFPO_INLINE Int to_int(Vec x) { return _mm256_cvtps_epi32(x); }
  static CFPO_INLINE Int low_halves(Int even, Int odd) {
    return _mm256_blend_epi16(even, _mm256_slli_epi32(odd, 16), 0xAA);
  }
  static CFPO_INLINE Int high_halves(Int even, Int odd) {
    return _mm256_blend_epi16(_mm256_srli_epi32(even, 16), odd, 0xAA);
  }
  static CFPO_INLINE Int add16(Int a, Int b) { return _mm256_add_epi16(a, b); }
  static CFPO_INLINE Int mul_high(Int a, Int b) { return _mm256_mulhi_epu16(a, b); }
  static CFPO_INLINE Int mul_high_rounded(Int a, Int b) { return _mm256_mulhrs_epi16(a, b); }
  static CFPO_INLINE Int shift_left7(Int a) { return _mm256_slli_epi16(a, 7); }
  // a + b where n > floor, else 0
  static CFPO_INLINE Int add16_above(Int n, Int floor, Int a, Int b) {
    return _mm256_and_si256(add16(a, b), _mm256_cmpgt_epi16(n, floor));
  }

  static CFPO_INLINE Vec widen(const float* p) { return _mm256_loadu_ps(p); }
  static CFPO_INLINE Vec widen(const bfloat16* p) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
  }
  static CFPO_INLINE Vec widen(const float16* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }

  static CFPO_INLINE float load1(float x) { return x; }
  static CFPO_INLINE void load2(const float* p, Vec& a, Vec& b) {
    a = _mm256_loadu_ps(p);
    b = _mm256_loadu_ps(p + 8);
  }
  template <bool kStream>
  static CFPO_INLINE void store2(float* p, Vec a, Vec b) {
    store<kStream>(p, _mm256_castps_si256(a));
    store<kStream>(p + 8, _mm256_castps_si256(b));
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
  template <bool kStream>
  static CFPO_INLINE void store2(bfloat16* p, Vec even, Vec odd) {
    const __m256i half = _mm256_set1_epi32(0x8000);
    const __m256i low = _mm256_srli_epi32(_mm256_add_epi32(_mm256_castps_si256(even), half), 16);
    const __m256i high = _mm256_add_epi32(_mm256_castps_si256(odd), half);
    store<kStream>(p, _mm256_blend_epi16(low, high, 0xAA));
  }

  static CFPO_INLINE float load1(float16 x) {
    return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(x.bits)));
  }
  static CFPO_INLINE void load2(const float16* p, Vec& a, Vec& b) {
    a = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    b = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)));
  }
  template <bool kStream>
  static CFPO_INLINE void store2(float16* p, Vec a, Vec b) {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, kNearest));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(b, kNearest));
  }
};

}  // namespace
}  // namespace cfpo::cpu
