// The sweeps over a row segment, written once over an instruction set `Isa`.
//
// Included by one file per level, each compiled with its own flags. `Isa` is a type private to
// that file, so that no instantiation is shared between levels: a linker that merged them could
// put AVX-512 code behind the baseline's symbols. For the same reason nothing here may call an
// inline function of another header.
#pragma once

#include <type_traits>

#include "cpu/bf16_gradient.h"
#include "cpu/isa.h"
#include "cpu/segment_ops.h"

namespace cfpo::cpu {
namespace {

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

// Fetches into the caches, beside a sweep, half as much as it works on. Into L1 too: a hint that
// leaves it out makes the sweeps of Zen 4 slower than no fetching at all.
template <class Isa, class T>
class Fetcher {
 public:
  // Without an address: what the sweep is about to read, which costs nothing.
  CFPO_INLINE Fetcher(const void* at, const T* x) {
    at_ = static_cast<const char*>(at != nullptr ? at : x);
  }
  CFPO_INLINE void next_block() {
    constexpr int kBytes = kBlock<Isa, T> * static_cast<int>(sizeof(T)) / 2;
#pragma GCC unroll 4
    for (int k = 0; k < kBytes; k += kCacheLine) __builtin_prefetch(at_ + k);
    at_ += kBytes;
  }

 private:
  const char* at_;
};

// Calls body(pointer) for every block of kCount elements. The last, short one, and the one that
// holds element `skip`, are read through a copy with -inf in the gaps, whose exponentials are
// exact zeros; of those body's second argument is true.
template <int kCount, class T, class Body>
CFPO_INLINE void for_each_block(const T* x, std::int64_t n, std::int64_t skip, Body body) {
  const auto patched = [&](std::int64_t begin) CFPO_INLINE_LAMBDA {
    T block[kCount];
    for (int k = 0; k < kCount; ++k) {
      block[k] = begin + k < n ? x[begin + k] : LowestBits<T>::value;
    }
    if (skip >= begin && skip < begin + kCount) block[skip - begin] = LowestBits<T>::value;
    body(static_cast<const T*>(block), std::true_type{});
  };
  std::int64_t i = 0;
  if (skip >= 0 && skip < n) {
    for (; i + kCount <= skip; i += kCount) body(x + i, std::false_type{});
    patched(i);
    i += kCount;
  }
  for (; i + kCount <= n; i += kCount) body(x + i, std::false_type{});
  if (i < n) patched(i);
}

template <class Isa, class T>
float max_segment(const void* x_raw, std::int64_t n, std::int64_t skip) {
  using Vec = typename Isa::Vec;
  Vec top0 = Isa::set1(-kInf), top1 = top0;
  for_each_block<2 * Isa::kLanes>(static_cast<const T*>(x_raw), n, skip,
                                  [&](const T* x, auto) CFPO_INLINE_LAMBDA {
                                    Vec a, b;
                                    Isa::load2(x, a, b);
                                    top0 = Isa::max(a, top0);
                                    top1 = Isa::max(b, top1);
                                  });
  return Isa::horizontal_max(Isa::max(top0, top1));
}

template <class Isa, class T>
std::int64_t find_in_segment(const void* x, std::int64_t n, std::int64_t skip, float value) {
  for (std::int64_t i = 0; i < n; ++i) {
    if (Isa::load1(static_cast<const T*>(x)[i]) == value && i != skip) return i;
  }
  return -1;
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
  // After the last flush.
  CFPO_INLINE float total() const {
    return Isa::horizontal_sum(Isa::add(Isa::add(high[0], high[1]), Isa::add(high[2], high[3])));
  }
  CFPO_INLINE float largest() const {
    return Isa::horizontal_max(Isa::max(Isa::max(high[0], high[1]), Isa::max(high[2], high[3])));
  }
};

// Loads for an exponential that saturates.
template <class Isa, class T>
struct NoGuard {
  template <bool kLeast>
  CFPO_INLINE void load2(const T* p, typename Isa::Vec& a, typename Isa::Vec& b) {
    Isa::load2(p, a, b);
  }
  bool exceeds(float) const { return false; }
  float least() const { return -kInf; }
};

CFPO_INLINE SegmentSum no_sum(float ref, float nan_or_zero) {
  return {{ref, nan_or_zero, 0.0f}, false, -kInf};
}

// The least of the elements that for_each_block reads through a copy.
template <class Isa, class T>
float least_of_patched(const T* x, std::int64_t n, std::int64_t skip) {
  constexpr std::int64_t kCount = kBlock<Isa, T>;
  float least = kInf;
  const std::int64_t places[] = {skip, n};
  for (const std::int64_t within : places) {
    if (within < 0 || within > n) continue;
    const std::int64_t begin = within / kCount * kCount;
    for (std::int64_t i = begin; i < n && i < begin + kCount; ++i) {
      const float value = Isa::load1(x[i]);
      if (value < least && i != skip) least = value;
    }
  }
  return least;
}

// One pass that trusts `ref`; with kNarrow also that no element is far below, unless the result's
// `least` is -inf.
template <class Isa, class T, bool kWeighted, bool kNarrow, class Exp2, class Guard>
SegmentSum sum_with(const T* x_begin, std::int64_t n, std::int64_t skip, float scale, float ref,
                    const void* prefetch) {
  using Vec = typename Isa::Vec;
  constexpr int kVectors = kBlock<Isa, T> / Isa::kLanes;
  constexpr int kBlocksPerFlush = 64 / kVectors;
  const Exp2 exp2(scale, ref);
  RunningSum<Isa> sum, weighted;
  Guard guard;
  Fetcher<Isa, T> fetcher(prefetch, x_begin);
  int blocks = 0;
  for_each_block<kBlock<Isa, T>>(
      x_begin, n, skip, [&](const T* x, auto patched) CFPO_INLINE_LAMBDA {
        constexpr bool kClamps = !kNarrow || decltype(patched)::value;
        fetcher.next_block();
#pragma GCC unroll 8
        for (int k = 0; k < kVectors; k += 2) {
          // Copies of the sums: compilers keep an array in registers only if no pointer goes there.
          Vec v[2], e[2], low[2] = {sum.low[k % 4], sum.low[k % 4 + 1]};
          guard.template load2<!kClamps>(x + k * Isa::kLanes, v[0], v[1]);
          exp2.template add<kClamps>(v, low, e);  // the same with an entropy and without
          sum.low[k % 4] = low[0];
          sum.low[k % 4 + 1] = low[1];
          for (int j = 0; kWeighted && j < 2; ++j) {
            const Vec u = exp2.exponent(v[j]);
            weighted.low[k % 4 + j] = Isa::fma(u, e[j], weighted.low[k % 4 + j]);
          }
        }
        if (++blocks % kBlocksPerFlush == 0) {
          sum.flush();
          if (kWeighted) weighted.flush();
        }
      });
  if (guard.exceeds((kGuardedExponent + ref) / scale)) return no_sum(ref, __builtin_nanf(""));
  float least = -kInf;
  if constexpr (kNarrow) {
    const float of_whole = guard.least(), of_patched = least_of_patched<Isa>(x_begin, n, skip);
    least = of_whole < of_patched ? of_whole : of_patched;
    if (!(least * scale - ref > kLeastExponent)) return no_sum(ref, 0.0f);
  }
  sum.flush();
  if (!kWeighted) return {{ref, sum.total(), 0.0f}, false, least};
  weighted.flush();
  constexpr float kPeak = 0.875f;
  const bool peaked = sum.largest() > kPeak * sum.total();
  return {{ref, sum.total(), weighted.total()}, peaked, least};
}

template <class Isa, class T, bool kWeighted>
SegmentSum sum_with_reference(const T* x, std::int64_t n, std::int64_t skip, float scale, float ref,
                              bool narrow, const void* prefetch) {
  if constexpr (Isa::kSplits) {
    using Guard = typename Isa::template Guard<T>;
    using Exp2 = typename Isa::SumExp2;
    if (Exp2::fits(scale, ref)) {
      if constexpr (!kWeighted) {
        constexpr std::int64_t kWorthwhile = 512;  // columns; those of two blocks one by one
        if (narrow && n >= kWorthwhile) {
          const SegmentSum sum =
              sum_with<Isa, T, false, true, Exp2, Guard>(x, n, skip, scale, ref, prefetch);
          // Above the reference it is NaN and not known either; the caller sees to that.
          if (sum.least != -kInf || sum.sums.sum != sum.sums.sum) return sum;
          prefetch = nullptr;
        }
      }
      return sum_with<Isa, T, kWeighted, false, Exp2, Guard>(x, n, skip, scale, ref, prefetch);
    }
  }
  return sum_with<Isa, T, kWeighted, false, typename Isa::template Exp2<5, true>, NoGuard<Isa, T>>(
      x, n, skip, scale, ref, prefetch);
}

// The search for the maximum is skipped where the row's first block already gave a reference
// that keeps the sum in range: any reference is exact, only overflow would harm.
template <class Isa, class T, bool kWeighted>
SegmentSum sum_segment(const void* x_raw, std::int64_t n, std::int64_t skip, float scale,
                       float ref_hint, bool narrow, const void* prefetch) {
  const T* x = static_cast<const T*>(x_raw);
  constexpr float kLargest = 65536.0f;  // a guess 16 binary digits too low costs no accuracy yet
  if (ref_hint - ref_hint == 0.0f) {
    const SegmentSum part =
        sum_with_reference<Isa, T, kWeighted>(x, n, skip, scale, ref_hint, narrow, prefetch);
    if (part.sums.sum < kLargest) return part;
  }
  float ref = __builtin_ceilf(max_segment<Isa, T>(x, n, skip) * scale);
  if (!(ref < kInf)) return no_sum(ref, __builtin_nanf(""));
  if (ref == -kInf) {
    // Only -inf, or NaN that the search for the maximum passed over.
    float nan_or_zero = 0.0f;
    for (std::int64_t i = 0; i < n; ++i) {
      const float value = Isa::load1(x[i]);
      if (value != value && i != skip) nan_or_zero = value;
    }
    return no_sum(ref, nan_or_zero);
  }
  // A segment of bans by -1e10, say: zeros beside any row that is not given up, and near its own
  // coarse reference infinities.
  if (ref < -kLargestRef) ref = -kLargestRef;
  return sum_with_reference<Isa, T, kWeighted>(x, n, skip, scale, ref, narrow, nullptr);
}

// A softcap: see core/softcap.h.
template <class Isa>
struct Cap {
  using Vec = typename Isa::Vec;
  using Ratio = TanhRatio<float>;
  Vec limit, minus_limit, inverse, minus_inverse;

  explicit Cap(const Softcap& softcap)
      : limit(Isa::set1(Ratio::kLimit * softcap.cap)),
        minus_limit(Isa::set1(-Ratio::kLimit * softcap.cap)),
        inverse(Isa::set1(softcap.inverse)),
        minus_inverse(Isa::set1(-softcap.inverse)) {}

  template <int kCount>
  CFPO_INLINE void values(Vec (&x)[kCount]) const {
    constexpr Ratio ratio{};
    Vec s[kCount], p[kCount], q[kCount];
    for (int k = 0; k < kCount; ++k) {
      x[k] = Isa::min(limit, Isa::max(minus_limit, x[k]));  // a NaN passes both
      const Vec t = Isa::mul(x[k], inverse);
      s[k] = Isa::mul(t, t);
      p[k] = Isa::set1(ratio.p[Ratio::kDegree]);
      q[k] = Isa::set1(ratio.q[Ratio::kDegree]);
    }
#pragma GCC unroll 8
    for (int i = Ratio::kDegree - 1; i >= 0; --i) {
#pragma GCC unroll 4
      for (int k = 0; k < kCount; ++k) {
        p[k] = Isa::fma(p[k], s[k], Isa::set1(ratio.p[i]));
        q[k] = Isa::fma(q[k], s[k], Isa::set1(ratio.q[i]));
      }
    }
    for (int k = 0; k < kCount; ++k) x[k] = Isa::mul(x[k], Isa::div(p[k], q[k]));
  }
  // From a value; not below 0 where that is rounded to more than c.
  CFPO_INLINE Vec slope(Vec y) const {
    const Vec slope = Isa::fma(Isa::mul(y, minus_inverse), Isa::mul(y, inverse), Isa::set1(1.0f));
    return Isa::max(Isa::set1(0.0f), slope);
  }
};
struct NoCap {};

template <class Isa, class T>
void cap_segment(const void* x_raw, float* y, std::int64_t n, const Softcap& softcap,
                 const void* prefetch) {
  constexpr int kCount = kBlock<Isa, T>, kLanes = Isa::kLanes;
  const T* x = static_cast<const T*>(x_raw);
  const Cap<Isa> cap(softcap);
  const auto block = [&](const T* from, float* to) CFPO_INLINE_LAMBDA {
#pragma GCC unroll 8
    for (int k = 0; k < kCount; k += 2 * kLanes) {
      typename Isa::Vec v[2] = {Isa::widen(from + k), Isa::widen(from + k + kLanes)};
      cap.values(v);
      Isa::template store2<false>(to + k, v[0], v[1]);
    }
  };
  Fetcher<Isa, T> fetcher(prefetch, x);
  std::int64_t i = 0;
  for (; i + kCount <= n; i += kCount) {
    fetcher.next_block();
    block(x + i, y + i);
  }
  if (i < n) {
    T padded[kCount] = {};
    float capped[kCount];
    for (int k = 0; i + k < n; ++k) padded[k] = x[i + k];
    block(padded, capped);
    for (int k = 0; i + k < n; ++k) y[i + k] = capped[k];
  }
}

// A block of the gradient in float32; of elements before a softcap where `AnyCap` is a Cap.
template <class Isa, class T, bool kLinear, class Exp2, class AnyCap = NoCap>
struct FloatGradient {
  using Vec = typename Isa::Vec;
  static constexpr bool kCapped = !std::is_same_v<AnyCap, NoCap>;
  Exp2 exp2;
  Vec constant, linear;
  AnyCap cap;

  explicit FloatGradient(const GradientCoefs& coefs, const AnyCap& cap = {})
      : exp2(coefs.scale, coefs.ref, kLinear ? 1.0f : coefs.constant),
        constant(Isa::set1(coefs.constant)),
        linear(Isa::set1(coefs.linear)),
        cap(cap) {}

  template <bool kStream>
  CFPO_INLINE void write(const T* in, T* to) const {
#pragma GCC unroll 8
    for (int k = 0; k < kBlock<Isa, T>; k += 2 * Isa::kLanes) {
      Vec v[2], e[2];
      Isa::load2(in + k, v[0], v[1]);
      if constexpr (kCapped) cap.values(v);
      exp2.values(v, e);
      for (int j = 0; kLinear && j < 2; ++j) {
        e[j] = Isa::mul(e[j], Isa::fma(linear, exp2.exponent(v[j]), constant));
      }
      if constexpr (kCapped) {
        for (int j = 0; j < 2; ++j) e[j] = Isa::mul(e[j], cap.slope(v[j]));
      }
      Isa::template store2<kStream>(to + k, e[0], e[1]);
    }
  }
};

template <class Isa, class T, bool kStream, class Block>
void write_blocks(const T* x, T* out, std::int64_t n, const void* prefetch, const Block& block) {
  constexpr int kCount = kBlock<Isa, T>;
  auto short_block = [&](std::int64_t begin, std::int64_t count) {
    T padded[kCount];
    for (int k = 0; k < kCount; ++k) {
      padded[k] = k < count ? x[begin + k] : LowestBits<T>::value;
    }
    block.template write<false>(padded, padded);
    for (int k = 0; k < count; ++k) out[begin + k] = padded[k];
  };
  // Stores that straddle cache lines cost a quarter of this sweep; rows of odd V start anywhere.
  constexpr int kAligned = kCacheLine / sizeof(T);
  const std::int64_t misaligned = reinterpret_cast<std::uintptr_t>(out) / sizeof(T) % kAligned;
  std::int64_t i = 0;
  if (misaligned != 0) {
    const std::int64_t head = kAligned - misaligned;
    i = head < n ? head : n;
    short_block(0, i);
  }
  Fetcher<Isa, T> fetcher(prefetch, x + i);
  for (; i + kCount <= n; i += kCount) {
    fetcher.next_block();
    block.template write<kStream>(x + i, out + i);
  }
  for (; i < n; i += kCount) short_block(i, n - i);
}

template <class Isa, class T, bool kLinear, bool kStream>
void gradient_with(const T* x, T* out, std::int64_t n, const GradientCoefs& coefs, float least,
                   const void* prefetch) {
  const auto write = [&](const auto& block) {
    write_blocks<Isa, T, kStream>(x, out, n, prefetch, block);
  };
  if constexpr (Isa::kHalfLanes && !kLinear && std::is_same_v<T, bfloat16>) {
    if (Bf16Gradient<Isa, true>::fits(coefs)) {
      if (Bf16Gradient<Isa, false>::fits(coefs, least)) {
        return write(Bf16Gradient<Isa, false>(coefs));
      }
      return write(Bf16Gradient<Isa, true>(coefs));
    }
  }
  constexpr int kDegree = kGradientDegree<T>;
  if constexpr (Isa::kSplits) {
    using Exp2 = typename Isa::template SplitExp2<kDegree>;
    if (Exp2::fits(coefs.scale, coefs.ref)) {
      return write(FloatGradient<Isa, T, kLinear, Exp2>(coefs));
    }
  }
  write(FloatGradient<Isa, T, kLinear, typename Isa::template Exp2<kDegree, false>>(coefs));
}

template <class Isa, class T>
void gradient_segment(const void* x, void* out, std::int64_t n, const GradientCoefs& coefs,
                      float least, const void* prefetch, bool stream) {
  constexpr bool kStreams = Isa::kStreams && !std::is_same_v<T, float16>;  // no faster there
  const bool linear = coefs.linear != 0.0f;
  auto run = linear ? gradient_with<Isa, T, true, false> : gradient_with<Isa, T, false, false>;
  if constexpr (kStreams) {
    if (stream)
      run = linear ? gradient_with<Isa, T, true, true> : gradient_with<Isa, T, false, true>;
  }
  run(static_cast<const T*>(x), static_cast<T*>(out), n, coefs, least, prefetch);
  if constexpr (kStreams) {
    if (stream) Isa::finish_streaming();
  }
}

template <class Isa, class T>
void capped_gradient_segment(const void* x, void* out, std::int64_t n, const GradientCoefs& coefs,
                             const Softcap& softcap, const void* prefetch) {
  using Exp2 = typename Isa::template Exp2<kGradientDegree<T>, false>;
  const Cap<Isa> cap(softcap);
  const T* from = static_cast<const T*>(x);
  T* to = static_cast<T*>(out);
  if (coefs.linear != 0.0f) {
    const FloatGradient<Isa, T, true, Exp2, Cap<Isa>> block(coefs, cap);
    write_blocks<Isa, T, false>(from, to, n, prefetch, block);
  } else {
    const FloatGradient<Isa, T, false, Exp2, Cap<Isa>> block(coefs, cap);
    write_blocks<Isa, T, false>(from, to, n, prefetch, block);
  }
}

template <class Isa, class T>
void multiply_segment(void* x_raw, std::int64_t n, float factor) {
  using Vec = typename Isa::Vec;
  constexpr int kCount = 2 * Isa::kLanes;
  T* x = static_cast<T*>(x_raw);
  const Vec f = Isa::set1(factor);
  auto block = [&](T* p) CFPO_INLINE_LAMBDA {
    Vec a, b;
    Isa::load2(static_cast<const T*>(p), a, b);
    Isa::template store2<false>(p, Isa::mul(a, f), Isa::mul(b, f));
  };
  std::int64_t i = 0;
  for (; i + kCount <= n; i += kCount) block(x + i);
  if (i < n) {
    T padded[kCount] = {};
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
  Isa::template store2<false>(padded, Isa::set1(value), Isa::set1(value));
  static_cast<T*>(x)[i] = padded[0];
}

template <class Isa, class T>
constexpr SegmentOps segment_ops() {
  return {max_segment<Isa, T>,
          find_in_segment<Isa, T>,
          sum_segment<Isa, T, false>,
          sum_segment<Isa, T, true>,
          gradient_segment<Isa, T>,
          cap_segment<Isa, T>,
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
