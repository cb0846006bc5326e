// Storage types in vectors of 16 bytes, and 16 bytes from anywhere in shared memory.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "core/dtype.h"
#include "cuda/primitives.h"

namespace cfpo::cuda {

template <class T>
constexpr int kVectorElements = kVectorBytes / static_cast<int>(sizeof(T));

// A word holds one float, or two 16-bit elements, the first in its low half. `larger` is of each
// element the larger one, the other of a NaN.
template <class T>
struct Element;

template <>
struct Element<float> {
  static CFPO_DEVICE void unpack(std::uint32_t word, float* x) { std::memcpy(x, &word, 4); }
  static CFPO_DEVICE std::uint32_t pack(const float* x) {
    std::uint32_t word;
    std::memcpy(&word, x, 4);
    return word;
  }
  static CFPO_DEVICE std::uint32_t larger(std::uint32_t a, std::uint32_t b) {
    float x, y;
    unpack(a, &x);
    unpack(b, &y);
    x = std::fmax(x, y);
    return pack(&x);
  }
};

template <>
struct Element<bfloat16> {
  static CFPO_DEVICE void unpack(std::uint32_t word, float* x) {
    Element<float>::unpack(word << 16, x);
    Element<float>::unpack(word & 0xFFFF0000u, x + 1);
  }
  static CFPO_DEVICE std::uint32_t pack(const float* x) {
    return hw::floats_to_bfloat16s(x[0], x[1]);
  }
  static CFPO_DEVICE std::uint32_t larger(std::uint32_t a, std::uint32_t b) {
    return hw::max_bfloat16s(a, b);
  }
};

template <>
struct Element<float16> {
  static CFPO_DEVICE void unpack(std::uint32_t word, float* x) {
    x[0] = hw::half_to_float(static_cast<std::uint16_t>(word));
    x[1] = hw::half_to_float(static_cast<std::uint16_t>(word >> 16));
  }
  static CFPO_DEVICE std::uint32_t pack(const float* x) { return hw::floats_to_halves(x[0], x[1]); }
  static CFPO_DEVICE std::uint32_t larger(std::uint32_t a, std::uint32_t b) {
    return hw::max_halves(a, b);
  }
};

template <class T>
CFPO_DEVICE void unpack(const Vector& v, float* x) {
  for (int k = 0; k < 4; ++k) Element<T>::unpack(v.word[k], x + k * kVectorElements<T> / 4);
}

// Element j of v becomes -inf.
template <class T>
CFPO_DEVICE void remove_element(Vector& v, int j) {
  constexpr std::uint32_t kLowest = sizeof(T) == 4               ? 0xFF800000u
                                    : std::is_same_v<T, float16> ? 0xFC00u
                                                                 : 0xFF80u;
  constexpr int kBits = 8 * sizeof(T);
  constexpr std::uint32_t kMask = 0xFFFFFFFFu >> (32 - kBits);
  const int at = j * kBits % 32;
  std::uint32_t& word = v.word[j * kBits / 32];
  word = (word & ~(kMask << at)) | (kLowest << at);
}

template <class T>
CFPO_DEVICE Vector pack(const float* x) {
  Vector v;
  for (int k = 0; k < 4; ++k) v.word[k] = Element<T>::pack(x + k * kVectorElements<T> / 4);
  return v;
}

CFPO_DEVICE float load_element(const float* p) { return *p; }
CFPO_DEVICE float load_element(const bfloat16* p) {
  float x[2];
  Element<bfloat16>::unpack(p->bits, x);
  return x[0];
}
CFPO_DEVICE float load_element(const float16* p) { return hw::half_to_float(p->bits); }
template <class T>
CFPO_DEVICE float load_shared_element(const T* p) {
  const T x = hw::read_shared(p);
  return load_element(&x);
}

// An array in shared memory that is read only.
template <class T>
struct SharedArray {
  const T* begin;
  CFPO_DEVICE T operator[](int i) const { return hw::read_shared(begin + i); }
};

template <class T>
CFPO_DEVICE void store_element(T* p, float x) {
  const float pair[2] = {x, x};
  const std::uint32_t word = Element<T>::pack(pair);
  T element;
  std::memcpy(&element, &word, sizeof(T));
  hw::store_streaming(p, element);
}

// The 16 bytes that begin `shift` bytes into the aligned vector at `p`: a logical vector of a row
// that starts anywhere. `shift` is the same for a whole warp, so the branches are uniform. Where it
// is not 0, reads the next vector too.
CFPO_DEVICE Vector load_shifted(const char* p, int shift) {
  Vector v = hw::load_shared(p);
  if (shift == 0) return v;
  const Vector next = hw::load_shared(p + kVectorBytes);
  std::uint32_t w[8] = {v.word[0],    v.word[1],    v.word[2],    v.word[3],
                        next.word[0], next.word[1], next.word[2], next.word[3]};
  if (shift & 8) {
    for (int k = 0; k < 6; ++k) w[k] = w[k + 2];
  }
  if (shift & 4) {
    for (int k = 0; k < 5; ++k) w[k] = w[k + 1];
  }
  for (int k = 0; k < 4; ++k) v.word[k] = hw::funnel_shift(w[k], w[k + 1], (shift & 3) * 8);
  return v;
}

}  // namespace cfpo::cuda
