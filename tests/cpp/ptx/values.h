// Numbers as PTX has them, independent of what the compiler of this file makes of conversions.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "ptx/machine.h"

namespace ptx {

using i8 = std::int8_t;
using i16 = std::int16_t;
using i32 = std::int32_t;
using i64 = std::int64_t;
using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;
using f32 = float;
using f64 = double;
struct half {
  u16 bits;
};
struct bf16 {
  u16 bits;
};

// A register holds the bits of its type, and above these zeros.
template <class T>
T from_bits(u64 bits) {
  T x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
template <class T>
u64 to_bits(T x) {
  u64 bits = 0;
  std::memcpy(&bits, &x, sizeof x);
  return bits;
}
template <class T>
T get(const Thread& t, const Instruction& i, int n) {
  return from_bits<T>(raw(t, i.operands[static_cast<std::size_t>(n)]));
}
template <class T>
void put(Thread& t, const Instruction& i, int n, T x) {
  t.registers[i.operands[static_cast<std::size_t>(n)]] = to_bits(x);
}

// Operations in float32 give one NaN; in float64 the payload is not specified.
constexpr u32 kNan = 0x7FFFFFFF;
inline f32 canonical(f32 x) { return x != x ? from_bits<f32>(kNan) : x; }
template <class T>
T canonical(T x) {
  return x;
}

// Subnormal numbers to zeros of their sign: .ftz.
inline f32 flush(f32 x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

// To the nearest, ties to even, by integers.
inline u16 to_half(f32 x) {
  const u32 bits = static_cast<u32>(to_bits(x));
  const u32 sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) return 0x7FFF;
  if (magnitude >= 0x47800000) return static_cast<u16>(sign | 0x7C00);  // from 65536 on
  const int exponent = static_cast<int>(magnitude >> 23) - 127;
  if (exponent < -25) return static_cast<u16>(sign);
  const u32 fraction = (magnitude & 0x7FFFFF) | 0x800000;
  const bool subnormal = exponent < -14;
  const int drop = 13 + (subnormal ? -14 - exponent : 0);
  const u32 rest = fraction & ((1u << drop) - 1), tie = 1u << (drop - 1);
  u32 result = fraction >> drop;
  result += rest > tie || (rest == tie && (result & 1) != 0) ? 1 : 0;
  // The fraction's first bit, which no half stores, adds the last 1 to the exponent.
  if (!subnormal) result += static_cast<u32>(exponent + 14) << 10;
  return static_cast<u16>(sign | result);
}
inline f32 from_half(u16 bits) {
  const u32 sign = static_cast<u32>(bits & 0x8000) << 16;
  const u32 exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent == 31) return from_bits<f32>(fraction != 0 ? kNan : sign | 0x7F800000);
  if (exponent == 0) return std::copysign(static_cast<f32>(fraction) * 0x1p-24f, sign ? -1.0f : 1);
  return from_bits<f32>(sign | (exponent + 112) << 23 | fraction << 13);
}
inline u16 to_bf16(f32 x) {
  const u32 bits = static_cast<u32>(to_bits(x));
  if (x != x) return 0x7FFF;
  const u32 rest = bits & 0xFFFF, upper = bits >> 16;
  return static_cast<u16>(upper + (rest > 0x8000 || (rest == 0x8000 && (upper & 1) != 0) ? 1 : 0));
}
inline f32 from_bf16(u16 bits) { return canonical(from_bits<f32>(u64{bits} << 16)); }

// In [-1, 1), a hash of an operand's bits and the seed: how far off an approximation is, in units
// of what the manual allows it.
inline f64 error_of(const Thread& t, f32 x) {
  u64 hash = to_bits(x) * 0x9E3779B97F4A7C15ull;
  hash += t.machine->options.seed * 0xD1342543DE82EF95ull;
  hash ^= hash >> 29, hash *= 0xBF58476D1CE4E5B9ull, hash ^= hash >> 32;
  return static_cast<f64>(hash & 0xFFFFFFFF) * 0x1p-31 - 1.0;
}
// ex2.approx.ftz.f32: 2^-22 of the result.
inline f32 approximate_exp2(const Thread& t, f32 x) {
  x = flush(x);
  if (x != x) return from_bits<f32>(kNan);
  const bool whole = t.machine->options.exact_if_exact && x == std::floor(x);
  const f64 error = x == 0 || std::isinf(x) || whole ? 0.0 : error_of(t, x);
  return flush(static_cast<f32>(std::exp2(static_cast<f64>(x)) * (1.0 + error * 0x1p-22)));
}
// div.full.f32: 2 units in the last place, of which one is left to rounding.
inline f32 approximate_quotient(const Thread& t, f32 a, f32 b) {
  const f32 exact = canonical(a / b);
  const bool is_exact = t.machine->options.exact_if_exact && std::fma(exact, b, -a) == 0;
  if (is_exact || exact == 0 || !std::isfinite(exact)) return exact;
  return static_cast<f32>(static_cast<f64>(a) / b * (1.0 + error_of(t, a) * 0x1p-24));
}
// rcp.approx.ftz.f64: the upper words of the argument and of the result; what is subnormal is zero.
inline f64 approximate_reciprocal(f64 x) {
  constexpr u64 kUpper = 0xFFFFFFFF00000000ull;
  if (x != x) return x;
  f64 upper = from_bits<f64>(to_bits(x) & kUpper);
  if (std::fabs(upper) < 0x1p-1022) upper = std::copysign(0.0, x);
  const f64 y = 1.0 / upper;
  return std::fabs(y) < 0x1p-1022 ? std::copysign(0.0, y) : from_bits<f64>(to_bits(y) & kUpper);
}

}  // namespace ptx
