// Instructions that compute one register from others.
#pragma once

#include <functional>

#include "ptx/values.h"

namespace ptx {

template <class T>
constexpr bool is_float = std::is_floating_point_v<T>;
// Integers overflow by wrapping round: computed without sign, and wide enough not to become int.
template <class T>
using Wrapping = std::conditional_t<sizeof(T) == 8, u64, u32>;

struct Add {
  template <class T>
  T operator()(T a, T b) const {
    if constexpr (is_float<T>) return a + b;
    return static_cast<T>(static_cast<Wrapping<T>>(a) + static_cast<Wrapping<T>>(b));
  }
};
struct Sub {
  template <class T>
  T operator()(T a, T b) const {
    if constexpr (is_float<T>) return a - b;
    return static_cast<T>(static_cast<Wrapping<T>>(a) - static_cast<Wrapping<T>>(b));
  }
};
struct Mul {
  template <class T>
  T operator()(T a, T b) const {
    if constexpr (is_float<T>) return a * b;
    return static_cast<T>(static_cast<Wrapping<T>>(a) * static_cast<Wrapping<T>>(b));
  }
};
// The least integer by -1 wraps round; by 0 the result is the machine's, and an error here.
template <bool kRemainder>
struct Division {
  template <class T>
  T operator()(T a, T b) const {
    if constexpr (is_float<T>) {
      return a / b;
    } else {
      if (b == 0) throw Error("ptx: an integer divided by 0");
      if (std::is_signed_v<T> && b == static_cast<T>(-1)) return kRemainder ? T(0) : Sub()(T(0), a);
      return kRemainder ? a % b : a / b;
    }
  }
};
// A NaN loses; -0 is below +0.
template <bool kMax>
struct Extreme {
  template <class T>
  T operator()(T a, T b) const {
    if constexpr (is_float<T>) {
      if (a != a) return b;
      if (b != b) return a;
      if (a == b) return std::signbit(a) == kMax ? b : a;
    }
    return (a < b) == kMax ? b : a;
  }
};
struct Copysign {  // the first operand's sign
  template <class T>
  T operator()(T a, T b) const {
    return std::copysign(b, a);
  }
};
struct Reciprocal {
  f64 operator()(f64 a) const { return 1.0 / a; }
};
struct Neg {
  template <class T>
  T operator()(T a) const {
    if constexpr (is_float<T>) return -a;
    return Sub()(T(0), a);
  }
};
template <class T, class F>
void binary(Thread& t, const Instruction& i) {
  const T result = static_cast<T>(F()(get<T>(t, i, 1), get<T>(t, i, 2)));
  put<T>(t, i, 0, canonical(result));
}
template <class T, class F>
void unary(Thread& t, const Instruction& i) {
  put<T>(t, i, 0, static_cast<T>(F()(get<T>(t, i, 1))));
}
template <class T>
void absolute(Thread& t, const Instruction& i) {
  put<T>(t, i, 0, std::fabs(get<T>(t, i, 1)));
}
// Of 16 bits, whose infinity is given. A NaN's payload is not specified.
template <u16 kInfinity>
u16 absolute16(u16 bits) {
  bits &= 0x7FFF;
  return bits > kInfinity ? u16{0x7FFF} : bits;
}
template <u16 kInfinity>
void absolute16(Thread& t, const Instruction& i) {
  put<u16>(t, i, 0, absolute16<kInfinity>(get<u16>(t, i, 1)));
}
template <u16 kInfinity>
void absolute_pair(Thread& t, const Instruction& i) {
  const u32 pair = get<u32>(t, i, 1);
  const u32 upper = absolute16<kInfinity>(static_cast<u16>(pair >> 16));
  put<u32>(t, i, 0, upper << 16 | absolute16<kInfinity>(static_cast<u16>(pair)));
}
template <class F>
void logic(Thread& t, const Instruction& i) {
  put<u64>(t, i, 0, F()(get<u64>(t, i, 1), get<u64>(t, i, 2)) & 1);
}
inline void not_predicate(Thread& t, const Instruction& i) {
  put<u64>(t, i, 0, ~get<u64>(t, i, 1) & 1);
}
template <class T>
void multiply_add(Thread& t, const Instruction& i) {
  const T a = get<T>(t, i, 1), b = get<T>(t, i, 2), c = get<T>(t, i, 3);
  if constexpr (is_float<T>) {
    put<T>(t, i, 0, canonical(std::fma(a, b, c)));
  } else {
    put<T>(t, i, 0, Add()(Mul()(a, b), c));
  }
}
template <class T, class Wide>
void multiply_wide(Thread& t, const Instruction& i) {
  put<Wide>(t, i, 0, static_cast<Wide>(get<T>(t, i, 1)) * static_cast<Wide>(get<T>(t, i, 2)));
}
template <class T, class Wide>
void multiply_wide_add(Thread& t, const Instruction& i) {
  const Wide product = static_cast<Wide>(get<T>(t, i, 1)) * static_cast<Wide>(get<T>(t, i, 2));
  put<Wide>(t, i, 0, Add()(product, get<Wide>(t, i, 3)));
}

// Shifts by the width or more leave nothing, or the sign.
template <class T>
void shift_left(Thread& t, const Instruction& i) {
  const u32 n = get<u32>(t, i, 2);
  const auto x = static_cast<Wrapping<T>>(get<T>(t, i, 1));
  put<T>(t, i, 0, n < 8 * sizeof(T) ? static_cast<T>(x << n) : T(0));
}
template <class T>
void shift_right(Thread& t, const Instruction& i) {
  const u32 n = get<u32>(t, i, 2);
  const T x = get<T>(t, i, 1);
  put<T>(t, i, 0, n < 8 * sizeof(T) ? static_cast<T>(x >> n) : static_cast<T>(x < 0 ? -1 : 0));
}
inline void funnel_shift_right(Thread& t, const Instruction& i) {
  const u64 both = u64{get<u32>(t, i, 2)} << 32 | get<u32>(t, i, 1);
  put<u32>(t, i, 0, static_cast<u32>(both >> (get<u32>(t, i, 3) & 31)));
}
inline void extract_bits(Thread& t, const Instruction& i) {
  const u32 from = get<u32>(t, i, 2) & 255, count = get<u32>(t, i, 3) & 255;
  const u64 x = from < 32 ? get<u32>(t, i, 1) >> from : 0;
  put<u32>(t, i, 0, static_cast<u32>(count < 32 ? x & ((u64{1} << count) - 1) : x));
}
inline void reverse_bits(Thread& t, const Instruction& i) {
  const u32 x = get<u32>(t, i, 1);
  u32 y = 0;
  for (int k = 0; k < 32; ++k) y |= (x >> k & 1) << (31 - k);
  put<u32>(t, i, 0, y);
}
// bfind.shiftamt: by how much to shift to the left for the highest bit to come to the top.
inline void leading_zeros(Thread& t, const Instruction& i) {
  const u32 x = get<u32>(t, i, 1);
  put<u32>(t, i, 0, x != 0 ? static_cast<u32>(__builtin_clz(x)) : ~0u);
}

// `variant` has a bit for each way in which two numbers compare and that it is true of: 1 below,
// 2 equal, 4 above, 8 unordered.
template <class T>
u64 compare(const Instruction& i, T a, T b) {
  const int bit = a < b ? 1 : a == b ? 2 : a > b ? 4 : 8;
  return (i.variant & bit) != 0 ? 1 : 0;
}
template <class T>
void set_predicate(Thread& t, const Instruction& i) {
  put<u64>(t, i, 0, compare(i, get<T>(t, i, 1), get<T>(t, i, 2)));
}
template <f32 (*kFrom)(u16)>
void set_predicate16(Thread& t, const Instruction& i) {
  put<u64>(t, i, 0, compare(i, kFrom(get<u16>(t, i, 1)), kFrom(get<u16>(t, i, 2))));
}
// The first predicate is the lower halves'.
template <f32 (*kFrom)(u16)>
void set_predicate_pair(Thread& t, const Instruction& i) {
  const u32 a = get<u32>(t, i, 2), b = get<u32>(t, i, 3);
  for (int k = 0; k < 2; ++k) {
    const auto half = [k](u32 pair) { return kFrom(static_cast<u16>(pair >> 16 * k)); };
    put<u64>(t, i, k, compare(i, half(a), half(b)));
  }
}
template <class T>
void select(Thread& t, const Instruction& i) {
  put<T>(t, i, 0, get<T>(t, i, (get<u64>(t, i, 3) & 1) != 0 ? 1 : 2));
}

// Integers to others. Those with a sign fill the register that they are read from.
template <class To, class From>
void convert(Thread& t, const Instruction& i) {
  put<To>(t, i, 0, static_cast<To>(get<From>(t, i, 1)));
}
template <class To, class From>
void convert_float(Thread& t, const Instruction& i) {
  put<To>(t, i, 0, canonical(static_cast<To>(get<From>(t, i, 1))));
}
template <class To>
void convert_half(Thread& t, const Instruction& i) {
  put<To>(t, i, 0, static_cast<To>(from_half(get<u16>(t, i, 1))));
}
template <class To>
void convert_bf16(Thread& t, const Instruction& i) {
  put<To>(t, i, 0, static_cast<To>(from_bf16(get<u16>(t, i, 1))));
}
template <u16 (*kTo)(f32)>
void convert_narrow(Thread& t, const Instruction& i) {
  put<u16>(t, i, 0, kTo(get<f32>(t, i, 1)));
}
// The first operand becomes the upper half.
template <u16 (*kTo)(f32)>
void convert_pair(Thread& t, const Instruction& i) {
  put<u32>(t, i, 0, u32{kTo(get<f32>(t, i, 1))} << 16 | kTo(get<f32>(t, i, 2)));
}
// Of both halves.
template <u16 (*kTo)(f32), f32 (*kFrom)(u16)>
void max_pair(Thread& t, const Instruction& i) {
  const u32 a = get<u32>(t, i, 1), b = get<u32>(t, i, 2);
  const auto larger = [&](int at) {
    const f32 x = kFrom(static_cast<u16>(a >> at)), y = kFrom(static_cast<u16>(b >> at));
    return u32{kTo(canonical(Extreme<true>()(x, y)))} << at;
  };
  put<u32>(t, i, 0, larger(16) | larger(0));
}
template <class T, T (*kRound)(T), bool kFlush>
void round_float(Thread& t, const Instruction& i) {
  T x = get<T>(t, i, 1);
  if constexpr (kFlush) x = flush(x);
  put<T>(t, i, 0, canonical(kRound(x)));
}
// Towards zero. Out of range is the nearest that there is; NaN gives the least, between 32 bits 0.
template <class To, class From>
void truncate(Thread& t, const Instruction& i) {
  constexpr To kLeast = std::numeric_limits<To>::min(), kMost = std::numeric_limits<To>::max();
  const From x = get<From>(t, i, 1), limit = std::ldexp(From(1), std::numeric_limits<To>::digits);
  To result = x >= limit ? kMost : kLeast;
  if (x != x && sizeof(To) < 8 && sizeof(From) < 8) result = 0;
  if (std::fabs(x) < limit) result = static_cast<To>(x);
  put<To>(t, i, 0, result);
}
inline void exp2_approx(Thread& t, const Instruction& i) {
  put<f32>(t, i, 0, approximate_exp2(t, get<f32>(t, i, 1)));
}
inline void divide_approx(Thread& t, const Instruction& i) {
  put<f32>(t, i, 0, approximate_quotient(t, get<f32>(t, i, 1), get<f32>(t, i, 2)));
}
inline void reciprocal_approx(Thread& t, const Instruction& i) {
  put<f64>(t, i, 0, approximate_reciprocal(get<f64>(t, i, 1)));
}

template <class T>
void move(Thread& t, const Instruction& i) {
  put<T>(t, i, 0, get<T>(t, i, 1));
}
inline void move_predicate(Thread& t, const Instruction& i) {
  put<u64>(t, i, 0, get<u64>(t, i, 1) & 1);
}
template <class Part, int kParts>
void unpack(Thread& t, const Instruction& i) {
  const u64 x = get<u64>(t, i, kParts);
  for (int k = 0; k < kParts; ++k) put<Part>(t, i, k, static_cast<Part>(x >> 8 * sizeof(Part) * k));
}
template <class Part, int kParts>
void pack(Thread& t, const Instruction& i) {
  u64 x = 0;
  for (int k = 0; k < kParts; ++k) x |= u64{get<Part>(t, i, 1 + k)} << 8 * sizeof(Part) * k;
  put<u64>(t, i, 0, x);
}
inline void to_generic(Thread& t, const Instruction& i) {
  put<u64>(t, i, 0, get<u64>(t, i, 1) | kGenericShared);
}
// Of another address, such as null, the result is outside of shared memory.
inline void from_generic_shared(Thread& t, const Instruction& i) {
  put<u64>(t, i, 0, get<u64>(t, i, 1) & ~kGenericShared);
}

}  // namespace ptx
