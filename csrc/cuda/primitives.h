// The one door from the CUDA kernels to the hardware. Two implementations offer the same names in
// namespace cfpo::cuda::hw:
//
//   primitives_ptx.h                  the GPU
//   tests/cpp/emulation/primitives.h  a CPU, one fibre a thread, for tests (CFPO_EMULATE)
//
// Kernels use nothing else that is CUDA: no built-in variables, no intrinsics, no __shared__.
//
//   CFPO_DEVICE, CFPO_KERNEL(threads, blocks)   mark device functions and kernels; a kernel is
//                            compiled for blocks of at most `threads`, `blocks` of them on an SM
//   CFPO_ARGUMENT            begins a kernel's parameter that is a struct, read where it lies
//   thread_index, block_index, block_index_y, block_count, block_count_y, block_threads
//   shared_memory()          the block's dynamic shared memory, 16-byte aligned
//   sync_block, sync_warp    barriers; both also order memory between the threads they join
//   shuffle_xor(x, mask)     lane ^ mask's x, for float and double
//   shuffle(x, lane)         that lane's float
//   warp_max(x)              the largest of the warp's floats
//   copy_async16(to, from, policy), commit_copies(), wait_copies(pending)
//                            16 aligned bytes from global to shared memory. wait_copies returns
//                            when at most `pending` of this thread's committed groups are under
//                            way; other threads see the bytes after the next barrier
//   read_once(), read_again()  policies of copy_async16: whether L2 should keep the line
//   load_shared(p), load_global(p), store_streaming(p, vector)   16 aligned bytes
//   store_streaming(p, element)
//   exp2_approx(x)           2^x to 2^-22 relative; 0 for -inf, NaN for NaN
//   funnel_shift(low, high, bits)   32 bits from (high:low) >> bits, bits < 32
//   half_to_float(bits), floats_to_halves(low, high), floats_to_bfloat16s(low, high)
#pragma once

#include <cstdint>

namespace cfpo::cuda {

constexpr int kWarpThreads = 32;

// 16 bytes, the widest access that all GPUs have.
struct alignas(16) Vector {
  std::uint32_t word[4];
};
constexpr int kVectorBytes = sizeof(Vector);

}  // namespace cfpo::cuda

#if defined(CFPO_EMULATE)
#include "emulation/primitives.h"
#else
#include "cuda/primitives_ptx.h"
#endif
