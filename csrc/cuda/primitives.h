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
//   shared_memory()          the block's dynamic shared memory, 128-byte aligned
//   sync_block, sync_warp    barriers; both also order memory between the threads they join
//   sync_threads(count)      the same for the block's first `count` threads, whole warps
//   shuffle_xor(x, mask)     lane ^ mask's x, for float and double
//   shuffle(x, lane)         that lane's float
//   ballot(x), lowest_bit(bits)   a bit for each lane with x; the number of the lowest bit set
//   warp_max(x)              the largest of the warp's floats
//   copy_async16(to, from, policy), commit_copies(), wait_copies(pending)
//                            16 aligned bytes from global to shared memory. wait_copies returns
//                            when at most `pending` of this thread's committed groups are under
//                            way; other threads see the bytes after the next barrier
//   read_once(), read_again()  policies of copy_async16: whether L2 should keep the line
//   load_shared(p), store_shared(p, vector), load_global(p), store_streaming(p, vector)
//                            16 aligned bytes
//   read_shared(p)           an object of any type in shared memory
//   store_streaming(p, element)
//   exp2_approx(x)           2^x to 2^-22 relative; 0 for -inf, NaN for NaN
//   divide_approx(a, b)      a / b to 2 units in the last place, for |b| of 2^-126 to 2^126
//   funnel_shift(low, high, bits)   32 bits from (high:low) >> bits, bits < 32
//   half_to_float(bits), floats_to_halves(low, high), floats_to_bfloat16s(low, high)
//   max_halves(a, b), max_bfloat16s(a, b)   of both halves of a word; as fmax where one is NaN
//
// From compute capability 9.0 on, of blocks in a cluster:
//
//   kHasClusters             whether the code is compiled for such a device; stop() ends a kernel
//                            that should not have been started, with an error
//   cluster_rank()           this block's number within the cluster
//   cluster_arrive(), cluster_wait()   a barrier of all the cluster's threads in two halves; what
//                            was written before the first is seen after the second
//   cluster_arrive_relaxed() the first half where there is nothing to be seen but barriers, after
//                            fence_barrier_init: it waits for nothing
//   Barrier                  8 bytes of shared memory: a barrier whose phases end when `count`
//                            arrivals and all the bytes that they announced have come
//   barrier_init(barrier, count), fence_barrier_init()   by one thread; then a block barrier
//   barrier_arrive_expect(barrier, bytes)   one arrival, which announces copies of so many bytes
//   barrier_wait(barrier, parity)   until the phase of that parity (of its number) has ended; the
//                            bytes that it counted are there for all who waited
//   arrive_peer(barrier, rank)   one arrival at that barrier of block `rank`, which has to run
//   send_peer(to, rank, vector, barrier)   16 bytes to that address in block `rank`, counted as a
//                            copy by that barrier of it; the block has to run
//   bulk_load(to, from, bytes, barrier, policy)   global to shared memory; a multiple of 16 bytes,
//                            both ends aligned. Nobody uses the target until the phase has ended
//   bulk_store(to, from, bytes, policy), bulk_commit(), bulk_wait_read()
//                            shared to global memory. bulk_wait_read returns when all stores of
//                            this thread have read their bytes, so that these may be overwritten
//   fence_async()            what this thread has written to shared memory, bulk_store may read,
//                            and what it has read or written there, bulk_load and send_peer may
//                            overwrite, once this thread has met the one that starts them
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
#include "cuda/primitives_sm90.h"
#endif
