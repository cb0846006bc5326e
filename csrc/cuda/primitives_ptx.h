// primitives.h for NVIDIA GPUs, compute capability 8.0 and up.
#pragma once

#include <cuda_runtime.h>

#include "core/dtype.h"

#define CFPO_DEVICE __device__ __forceinline__
#define CFPO_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)

#define CFPO_ARGUMENT const __grid_constant__

namespace cfpo::cuda::hw {

CFPO_DEVICE void stop() { __trap(); }

CFPO_DEVICE int thread_index() { return threadIdx.x; }
CFPO_DEVICE int block_threads() { return blockDim.x; }
CFPO_DEVICE std::int64_t block_index() { return blockIdx.x; }
CFPO_DEVICE int block_index_y() { return blockIdx.y; }
CFPO_DEVICE std::int64_t block_count() { return gridDim.x; }
CFPO_DEVICE int block_count_y() { return gridDim.y; }

CFPO_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) uint4 memory[];
  return reinterpret_cast<char*>(memory);
}

CFPO_DEVICE void sync_block() { __syncthreads(); }
CFPO_DEVICE void sync_warp() { __syncwarp(); }
CFPO_DEVICE void sync_threads(int count) {
  asm volatile("barrier.sync 1, %0;" ::"r"(count) : "memory");
}

CFPO_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(~0u, x, mask); }
CFPO_DEVICE double shuffle_xor(double x, int mask) { return __shfl_xor_sync(~0u, x, mask); }

CFPO_DEVICE float shuffle(float x, int lane) { return __shfl_sync(~0u, x, lane); }

CFPO_DEVICE std::uint32_t ballot(bool x) { return __ballot_sync(~0u, x); }
CFPO_DEVICE int lowest_bit(std::uint32_t bits) { return __ffs(static_cast<int>(bits)) - 1; }

// By one reduction of integers: a float's bits, those of negatives turned round, order like it.
CFPO_DEVICE float warp_max(float x) {
  const int bits = __float_as_int(x);
  const int top = __reduce_max_sync(~0u, bits ^ ((bits >> 31) & 0x7FFFFFFF));
  return __int_as_float(top ^ ((top >> 31) & 0x7FFFFFFF));
}

using Policy = std::uint64_t;

CFPO_DEVICE Policy read_once() {
  Policy policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
CFPO_DEVICE Policy read_again() {
  Policy policy;
  asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

CFPO_DEVICE std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}

// Through L2 only (.cg): what an SM reads here, another may have written in an earlier kernel.
CFPO_DEVICE void copy_async16(void* to, const void* from, Policy policy) {
  asm volatile(
      "cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
      "l"(from), "l"(policy)
      : "memory");
}
CFPO_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
CFPO_DEVICE void wait_copies_constant() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
// The instruction takes a constant; beyond 7 it waits for more than it must.
CFPO_DEVICE void wait_copies(int pending) {
  switch (pending) {
    case 0:
      return wait_copies_constant<0>();
    case 1:
      return wait_copies_constant<1>();
    case 2:
      return wait_copies_constant<2>();
    case 3:
      return wait_copies_constant<3>();
    case 4:
      return wait_copies_constant<4>();
    case 5:
      return wait_copies_constant<5>();
    case 6:
      return wait_copies_constant<6>();
    default:
      return wait_copies_constant<7>();
  }
}

template <class T>
CFPO_DEVICE T read_shared(const T* p) {
  return *p;
}
CFPO_DEVICE Vector load_shared(const void* p) {
  Vector v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "r"(shared_address(p))
               : "memory");
  return v;
}

CFPO_DEVICE void store_shared(void* p, Vector v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(p)), "r"(v.word[0]),
               "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3])
               : "memory");
}

CFPO_DEVICE Vector load_global(const void* p) {
  const uint4 v = *static_cast<const uint4*>(p);
  return {{v.x, v.y, v.z, v.w}};
}

CFPO_DEVICE void store_streaming(void* p, Vector v) {
  __stcs(static_cast<uint4*>(p), make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]));
}
CFPO_DEVICE void store_streaming(float* p, float element) { __stcs(p, element); }
CFPO_DEVICE void store_streaming(bfloat16* p, bfloat16 element) {
  __stcs(reinterpret_cast<unsigned short*>(p), element.bits);
}
CFPO_DEVICE void store_streaming(float16* p, float16 element) {
  __stcs(reinterpret_cast<unsigned short*>(p), element.bits);
}

CFPO_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

CFPO_DEVICE float divide_approx(float a, float b) {
  float y;
  asm("div.approx.ftz.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

CFPO_DEVICE std::uint32_t funnel_shift(std::uint32_t low, std::uint32_t high, int bits) {
  return __funnelshift_r(low, high, bits);
}

CFPO_DEVICE float half_to_float(std::uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}
CFPO_DEVICE std::uint32_t floats_to_halves(float low, float high) {
  std::uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
CFPO_DEVICE std::uint32_t floats_to_bfloat16s(float low, float high) {
  std::uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
CFPO_DEVICE std::uint32_t max_halves(std::uint32_t a, std::uint32_t b) {
  asm("max.f16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
  return a;
}
CFPO_DEVICE std::uint32_t max_bfloat16s(std::uint32_t a, std::uint32_t b) {
  asm("max.bf16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
  return a;
}

}  // namespace cfpo::cuda::hw
