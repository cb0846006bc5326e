// csrc/cuda/primitives.h on a CPU.
#pragma once

#include <cmath>

#include "core/dtype.h"
#include "emulation/async.h"

#define CFPO_DEVICE inline
#define CFPO_KERNEL(threads, blocks) inline void
#define CFPO_ARGUMENT const

namespace cfpo::cuda::hw {

inline int thread_index() { return emulation::current().index; }
inline int block_threads() { return static_cast<int>(emulation::current().block->threads.size()); }
inline std::int64_t block_index() { return emulation::current().block->index; }
inline int block_index_y() { return emulation::current().block->index_y; }
inline std::int64_t block_count() { return emulation::machine().block_count; }
inline int block_count_y() { return emulation::machine().block_count_y; }
inline char* shared_memory() { return emulation::current().block->shared.get(); }

inline void sync_block() { emulation::wait_at(emulation::Meeting::kBlockSync); }
inline void sync_warp() { emulation::wait_at(emulation::Meeting::kWarpSync); }
inline void sync_threads(int count) { emulation::sync_threads(count); }

inline float shuffle_xor(float x, int mask) {
  return emulation::exchange(x, thread_index() % 32 ^ mask);
}
inline double shuffle_xor(double x, int mask) {
  return emulation::exchange(x, thread_index() % 32 ^ mask);
}
inline float shuffle(float x, int lane) { return emulation::exchange(x, lane); }
inline std::uint32_t ballot(bool x) {
  std::uint32_t bits = x ? 1u << thread_index() % 32 : 0u;
  for (int mask = 16; mask > 0; mask /= 2) {
    bits |= emulation::exchange(bits, thread_index() % 32 ^ mask);
  }
  return bits;
}
inline int lowest_bit(std::uint32_t bits) { return __builtin_ctz(bits); }
inline float warp_max(float x) {
  for (int mask = 16; mask > 0; mask /= 2) x = std::fmax(x, shuffle_xor(x, mask));
  return x;
}

using Policy = int;
inline Policy read_once() { return 0; }
inline Policy read_again() { return 1; }
inline void copy_async16(void* to, const void* from, Policy) { emulation::copy_async(to, from); }
inline void commit_copies() { emulation::commit_copies(); }
inline void wait_copies(int pending) { emulation::wait_copies(pending); }

template <class T>
T read_shared(const T* p) {
  T x;
  emulation::read_shared(&x, p, sizeof x);
  return x;
}
inline Vector load_shared(const void* p) {
  emulation::check_shared(p);
  return read_shared(static_cast<const Vector*>(p));
}
inline void store_shared(void* p, Vector v) { emulation::store_shared(p, &v); }
inline Vector load_global(const void* p) {
  emulation::check_aligned(p);
  return *static_cast<const Vector*>(p);
}
inline void store_streaming(void* p, Vector v) {
  emulation::check_aligned(p);
  std::memcpy(p, &v, sizeof v);
}
template <class T>
void store_streaming(T* p, T element) {
  *p = element;
}

constexpr bool kHasClusters = true;
inline void stop() { emulation::fail("a kernel that should not have been started"); }
inline int cluster_rank() {
  return static_cast<int>(emulation::current().block->index % emulation::cluster_size());
}
inline void cluster_arrive() { ++emulation::current().cluster_arrivals; }
inline void cluster_arrive_relaxed() { cluster_arrive(); }
inline void cluster_wait() { emulation::cluster_wait(); }

using Barrier = std::uint64_t;
inline void barrier_init(Barrier* barrier, int count) { emulation::barrier_init(barrier, count); }
inline void fence_barrier_init() {}
inline void barrier_arrive_expect(Barrier* barrier, int bytes) {
  emulation::barrier_arrive(barrier, static_cast<std::size_t>(bytes));
}
inline void barrier_wait(Barrier* barrier, int parity) { emulation::barrier_wait(barrier, parity); }
inline void arrive_peer(Barrier* barrier, int rank) { emulation::arrive_peer(barrier, rank); }
inline void send_peer(void* to, int rank, Vector v, Barrier* barrier) {
  emulation::send_peer(to, rank, &v, sizeof v, barrier);
}
inline void bulk_load(void* to, const void* from, int bytes, Barrier* barrier, Policy) {
  emulation::bulk_load(to, from, static_cast<std::size_t>(bytes), barrier);
}
inline void bulk_store(void* to, const void* from, int bytes, Policy) {
  emulation::bulk_store(to, from, static_cast<std::size_t>(bytes));
}
inline void bulk_commit() { emulation::bulk_commit(); }
inline void bulk_wait_read() { emulation::bulk_wait_read(); }
inline void fence_async() { emulation::fence_async(); }

// As far from 2^x as the hardware's instruction may be, so that the tests' tolerances hold there.
inline float exp2_approx(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const double error = static_cast<double>(bits * 2654435761u) * 0x1p-31 - 1.0;  // in [-1, 1)
  const double power = std::exp2(static_cast<double>(x)) * (1.0 + error * 0x1p-22);
  return power < 0x1p-126 ? 0.0f : static_cast<float>(power);
}

inline float divide_approx(float a, float b) {
  std::uint32_t bits;
  std::memcpy(&bits, &a, sizeof bits);
  const double error = static_cast<double>(bits * 2654435761u) * 0x1p-31 - 1.0;
  return static_cast<float>(static_cast<double>(a) / b * (1.0 + error * 0x1p-23));
}

inline std::uint32_t funnel_shift(std::uint32_t low, std::uint32_t high, int bits) {
  return static_cast<std::uint32_t>(((static_cast<std::uint64_t>(high) << 32) | low) >> bits);
}

inline float half_to_float(std::uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float magnitude =
      exponent == 31 ? (fraction != 0 ? NAN : INFINITY)
                     : std::ldexp(static_cast<float>(exponent != 0 ? fraction + 1024 : fraction),
                                  (exponent != 0 ? exponent : 1) - 25);
  return bits & 0x8000 ? -magnitude : magnitude;
}

// To nearest, ties to even: what the FPU does when it adds a number of the right size.
inline std::uint32_t float_to_half(float x) {
  const std::uint32_t sign = std::signbit(x) ? 0x8000 : 0;
  const double magnitude = std::fabs(static_cast<double>(x));
  if (!(magnitude < 65520.0)) return magnitude != magnitude ? 0x7FFF : sign | 0x7C00;
  if (magnitude == 0.0) return sign;
  int exponent = 0;
  std::frexp(magnitude, &exponent);  // magnitude < 2^exponent
  const int unit = (exponent > -13 ? exponent : -13) - 11;
  const double steps = std::nearbyint(std::ldexp(magnitude, -unit));  // up to 2048
  return sign | (static_cast<std::uint32_t>(unit + 24) * 1024 + static_cast<std::uint32_t>(steps));
}
inline std::uint32_t floats_to_halves(float low, float high) {
  return float_to_half(low) | float_to_half(high) << 16;
}

inline std::uint32_t float_to_bfloat16(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (x != x) return 0x7FFF;
  return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
inline std::uint32_t floats_to_bfloat16s(float low, float high) {
  return float_to_bfloat16(low) | float_to_bfloat16(high) << 16;
}

inline std::uint32_t max_halves(std::uint32_t a, std::uint32_t b) {
  const auto larger = [&](int at) {
    return std::fmax(half_to_float(static_cast<std::uint16_t>(a >> at)),
                     half_to_float(static_cast<std::uint16_t>(b >> at)));
  };
  return floats_to_halves(larger(0), larger(16));
}
inline std::uint32_t max_bfloat16s(std::uint32_t a, std::uint32_t b) {
  const auto larger = [&](int at) {
    const std::uint32_t bits[2] = {a >> at << 16, b >> at << 16};
    float x[2];
    std::memcpy(x, bits, sizeof x);
    return std::fmax(x[0], x[1]);
  };
  return floats_to_bfloat16s(larger(0), larger(16));
}

}  // namespace cfpo::cuda::hw
