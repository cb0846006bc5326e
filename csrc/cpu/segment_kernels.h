// The sweeps over a row segment, written once over an instruction set `Isa`.
//
// Included by one file per level, each compiled with its own flags. `Isa` is a type private to
// that file, so that no instantiation is shared between levels: a linker that merged them could
// put AVX-512 code behind the baseline's symbols. For the same reason nothing here may call an
// inline function of another header.
//
// An Isa provides
//
//   Vec, kLanes, set1, add, mul, fma, horizontal_max, horizontal_sum
//   max: its second operand where either is NaN
//   load1: one element
//   load2, store2: two vectors of T at once, in an order of the Isa's choosing
//   Affine(scale, ref): x -> x * scale - ref to within one rounding of the result
//   Exp2<Degree, kSaturating>(scale, ref, factor): x -> factor * 2^(x * scale - ref) by a
//     polynomial of that degree. Exact zeros far below, NaN for NaN; above 2^126 it must stay huge
//     where kSaturating, and may be anything where not.
#pragma once

#include <limits>

#include "cpu/segment_ops.h"

#define CFPO_INLINE inline __attribute__((always_inline))
#define CFPO_INLINE_LAMBDA __attribute__((always_inline))

namespace cfpo::cpu {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr int kCacheLine = 64;

// Relative minimax polynomials for 2^f on [-1/2, 1/2].
template <int Degree>
struct Exp2Poly;
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
  CFPO_INLINE typename Isa::Vec operator()(typename Isa::Vec f) const {
    typename Isa::Vec p = c[Degree];
#pragma GCC unroll 8
    for (int i = Degree - 1; i >= 0; --i) p = Isa::fma(p, f, c[i]);
    return p;
  }
};

template <class T>
constexpr int kGradientDegree = 4;
template <>
constexpr int kGradientDegree<float> = 5;

template <class T>
struct LowestBits;
template <>
struct LowestBits<float> {
  static constexpr float value = -kInf;
};
template <>
struct LowestBits<bfloat16> {
  static constexpr bfloat16 value{0xFF80};
};
template <>
struct LowestBits<float16> {
  static constexpr float16 value{0xFC00};
};

// Calls body(pointer) for every block of kBlock elements. The last, short one, and the one that
// holds element `skip`, are read through a copy with -inf in the gaps, whose exponentials are
// exact zeros.
template <int kBlock, class T, class Body>
CFPO_INLINE void for_each_block(const T* x, std::int64_t n, std::int64_t skip, Body body) {
  const auto patched = [&](std::int64_t begin) CFPO_INLINE_LAMBDA {
    T block[kBlock];
    for (int k = 0; k < kBlock; ++k) {
      block[k] = begin + k < n ? x[begin + k] : LowestBits<T>::value;
    }
    if (skip >= begin && skip < begin + kBlock) block[skip - begin] = LowestBits<T>::value;
    body(static_cast<const T*>(block));
  };
  std::int64_t i = 0;
  if (skip >= 0 && skip < n) {
    for (; i + kBlock <= skip; i += kBlock) body(x + i);
    patched(i);
    i += kBlock;
  }
  for (; i + kBlock <= n; i += kBlock) body(x + i);
  if (i < n) patched(i);
}

template <class Isa, class T>
float max_segment(const void* x_raw, std::int64_t n, std::int64_t skip) {
  using Vec = typename Isa::Vec;
  Vec top0 = Isa::set1(-kInf), top1 = top0;
  for_each_block<2 * Isa::kLanes>(static_cast<const T*>(x_raw), n, skip,
                                  [&](const T* x) CFPO_INLINE_LAMBDA {
                                    Vec a, b;
                                    Isa::load2(x, a, b);
                                    top0 = Isa::max(a, top0);
                                    top1 = Isa::max(b, top1);
                                  });
  return Isa::horizontal_max(Isa::max(top0, top1));
}

// Four running sums, to hide the latency of the additions, in two levels: a long chain of float32
// additions of like numbers rounds the same way each time and would lose digits.
template <class Isa>
struct RunningSum {
  using Vec = typename Isa::Vec;
  Vec low[4], high[4];

  CFPO_INLINE RunningSum() {
    for (int k = 0; k < 4; ++k) low[k] = high[k] = Isa::set1(0.0f);
  }
  CFPO_INLINE void flush() {
    for (int k = 0; k < 4; ++k) {
      high[k] = Isa::add(high[k], low[k]);
      low[k] = Isa::set1(0.0f);
    }
  }
  CFPO_INLINE float total() {
    flush();
    return Isa::horizontal_sum(Isa::add(Isa::add(high[0], high[1]), Isa::add(high[2], high[3])));
  }
};

// One pass that trusts `ref`.
template <class Isa, class T, bool kWeighted>
PartialSum sum_with_reference(const T* x_begin, std::int64_t n, std::int64_t skip, float scale,
                              float ref) {
  using Vec = typename Isa::Vec;
  constexpr int kBlocksPerFlush = 16;
  const typename Isa::template Exp2<5, true> exp2(scale, ref, 1.0f);
  const typename Isa::Affine affine(scale, ref);
  const Vec lowest = Isa::set1(-1024.0f);  // 0 * -inf would be NaN; far below the smallest float
  RunningSum<Isa> sum, weighted;
  int blocks = 0;
  for_each_block<4 * Isa::kLanes>(x_begin, n, skip, [&](const T* x) CFPO_INLINE_LAMBDA {
    Vec v[4];
    Isa::load2(x, v[0], v[1]);
    Isa::load2(x + 2 * Isa::kLanes, v[2], v[3]);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const Vec e = exp2(v[k]);
      sum.low[k] = Isa::add(sum.low[k], e);
      if (kWeighted) {
        const Vec u = Isa::max(lowest, affine(v[k]));
        weighted.low[k] = Isa::fma(u, e, weighted.low[k]);
      }
    }
    if (++blocks % kBlocksPerFlush == 0) {
      sum.flush();
      if (kWeighted) weighted.flush();
    }
  });
  return {ref, sum.total(), kWeighted ? weighted.total() : 0.0f};
}

// The search for the maximum is skipped where the row's first block already gave a reference
// that keeps the sum in range: any reference is exact, only overflow would harm.
template <class Isa, class T, bool kWeighted>
PartialSum sum_segment(const void* x_raw, std::int64_t n, std::int64_t skip, float scale,
                       float ref_hint) {
  const T* x = static_cast<const T*>(x_raw);
  constexpr float kLargest = 65536.0f;  // a guess 16 binary digits too low costs no accuracy yet
  if (ref_hint - ref_hint == 0.0f) {
    const PartialSum part = sum_with_reference<Isa, T, kWeighted>(x, n, skip, scale, ref_hint);
    if (part.sum < kLargest) return part;
  }
  float ref = __builtin_ceilf(max_segment<Isa, T>(x, n, skip) * scale);
  if (!(ref < kInf)) return {ref, __builtin_nanf(""), 0.0f};
  if (ref == -kInf) {
    // Only -inf, or NaN that the search for the maximum passed over.
    float nan_or_zero = 0.0f;
    for (std::int64_t i = 0; i < n; ++i) {
      const float value = Isa::load1(x[i]);
      if (value != value && i != skip) nan_or_zero = value;
    }
    return {ref, nan_or_zero, 0.0f};
  }
  // A segment of bans by -1e10, say: zeros beside any row that is not given up, and near its own
  // coarse reference infinities.
  if (ref < -kLargestRef) ref = -kLargestRef;
  return sum_with_reference<Isa, T, kWeighted>(x, n, skip, scale, ref);
}

template <class Isa, class T, bool kLinear, bool kCapped>
void gradient_with(const T* x, T* out, std::int64_t n, const GradientCoefs& coefs,
                   float inverse_softcap, const T* prefetch) {
  using Vec = typename Isa::Vec;
  constexpr int kBlock = 4 * Isa::kLanes;
  const typename Isa::template Exp2<kGradientDegree<T>, false> exp2(
      coefs.scale, coefs.ref, kLinear ? 1.0f : coefs.constant);
  const typename Isa::Affine affine(coefs.scale, coefs.ref);
  const Vec lowest = Isa::set1(-1024.0f);
  const Vec constant = Isa::set1(coefs.constant), linear = Isa::set1(coefs.linear);
  const Vec zero = Isa::set1(0.0f), one = Isa::set1(1.0f);
  const Vec inverse = Isa::set1(inverse_softcap), minus_inverse = Isa::set1(-inverse_softcap);
  auto block = [&](const T* in, T* to) CFPO_INLINE_LAMBDA {
    Vec v[4];
    Isa::load2(in, v[0], v[1]);
    Isa::load2(in + 2 * Isa::kLanes, v[2], v[3]);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const Vec x = v[k], e = exp2(x);
      v[k] = kLinear ? Isa::mul(e, Isa::fma(linear, Isa::max(lowest, affine(x)), constant)) : e;
      if (kCapped) {  // softcap_slope, of every element
        const Vec slope = Isa::fma(Isa::mul(x, minus_inverse), Isa::mul(x, inverse), one);
        v[k] = Isa::mul(v[k], Isa::max(zero, slope));
      }
    }
    Isa::store2(to, v[0], v[1]);
    Isa::store2(to + 2 * Isa::kLanes, v[2], v[3]);
  };
  auto short_block = [&](std::int64_t begin, std::int64_t count) {
    T padded[kBlock];
    for (int k = 0; k < kBlock; ++k) {
      padded[k] = k < count ? x[begin + k] : LowestBits<T>::value;
    }
    block(padded, padded);
    for (int k = 0; k < count; ++k) out[begin + k] = padded[k];
  };
  // Stores that straddle cache lines cost a quarter of this sweep; rows of odd V start anywhere.
  constexpr int kAligned = kBlock * sizeof(T) < kCacheLine ? kBlock : kCacheLine / sizeof(T);
  const std::int64_t misaligned = reinterpret_cast<std::uintptr_t>(out) / sizeof(T) % kAligned;
  std::int64_t i = 0;
  if (misaligned != 0) {
    const std::int64_t head = kAligned - misaligned;
    i = head < n ? head : n;
    short_block(0, i);
  }
  if (prefetch != nullptr) {
    for (; i + kBlock <= n; i += kBlock) {
#pragma GCC unroll 8
      for (int k = 0; k < kBlock; k += kCacheLine / sizeof(T)) {
        __builtin_prefetch(prefetch + i + k, 0, 2);
      }
      block(x + i, out + i);
    }
  }
  for (; i + kBlock <= n; i += kBlock) block(x + i, out + i);
  for (; i < n; i += kBlock) short_block(i, n - i);
}

template <class Isa, class T>
void gradient_segment(const void* x, void* out, std::int64_t n, const GradientCoefs& coefs,
                      const void* prefetch) {
  const auto run = coefs.linear != 0.0f ? gradient_with<Isa, T, true, false>
                                        : gradient_with<Isa, T, false, false>;
  run(static_cast<const T*>(x), static_cast<T*>(out), n, coefs, 0.0f,
      static_cast<const T*>(prefetch));
}

template <class Isa, class T>
void capped_gradient_segment(const void* x, void* out, std::int64_t n, const GradientCoefs& coefs,
                             float inverse_softcap, const void* prefetch) {
  const auto run =
      coefs.linear != 0.0f ? gradient_with<Isa, T, true, true> : gradient_with<Isa, T, false, true>;
  run(static_cast<const T*>(x), static_cast<T*>(out), n, coefs, inverse_softcap,
      static_cast<const T*>(prefetch));
}

template <class Isa, class T>
void multiply_segment(void* x_raw, std::int64_t n, float factor) {
  using Vec = typename Isa::Vec;
  constexpr int kBlock = 2 * Isa::kLanes;
  T* x = static_cast<T*>(x_raw);
  const Vec f = Isa::set1(factor);
  auto block = [&](T* p) CFPO_INLINE_LAMBDA {
    Vec a, b;
    Isa::load2(static_cast<const T*>(p), a, b);
    Isa::store2(p, Isa::mul(a, f), Isa::mul(b, f));
  };
  std::int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) block(x + i);
  if (i < n) {
    T padded[kBlock] = {};
    for (int k = 0; i + k < n; ++k) padded[k] = x[i + k];
    block(padded);
    for (int k = 0; i + k < n; ++k) x[i + k] = padded[k];
  }
}

template <class Isa, class T>
float load_element(const void* x, std::int64_t i) {
  return Isa::load1(static_cast<const T*>(x)[i]);
}

template <class Isa, class T>
void store_element(void* x, std::int64_t i, float value) {
  T padded[2 * Isa::kLanes];
  Isa::store2(padded, Isa::set1(value), Isa::set1(value));
  static_cast<T*>(x)[i] = padded[0];
}

template <class Isa, class T>
constexpr SegmentOps segment_ops() {
  return {max_segment<Isa, T>,
          sum_segment<Isa, T, false>,
          sum_segment<Isa, T, true>,
          gradient_segment<Isa, T>,
          capped_gradient_segment<Isa, T>,
          multiply_segment<Isa, T>,
          load_element<Isa, T>,
          store_element<Isa, T>};
}

template <class Isa>
constexpr Level make_level(const char* name) {
  return {name,
          {segment_ops<Isa, float>(), segment_ops<Isa, bfloat16>(), segment_ops<Isa, float16>()}};
}

}  // namespace
}  // namespace cfpo::cpu
