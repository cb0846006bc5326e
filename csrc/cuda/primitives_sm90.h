// The primitives of primitives.h for clusters and bulk copies: PTX of compute capability 9.0.
// Where kHasClusters is false nothing may use them.
#pragma once

#include "cuda/primitives_ptx.h"

namespace cfpo::cuda::hw {

using Barrier = std::uint64_t;

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kHasClusters = false;
#else
constexpr bool kHasClusters = true;
#endif

CFPO_DEVICE int cluster_rank() {
  std::uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

// Not the .aligned forms: a warp's lanes may come here one by one.
CFPO_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
CFPO_DEVICE void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
}
CFPO_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

CFPO_DEVICE void barrier_init(Barrier* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count)
               : "memory");
}
// Also for the bulk copies, which come from elsewhere.
CFPO_DEVICE void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
CFPO_DEVICE void barrier_arrive_expect(Barrier* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
CFPO_DEVICE void barrier_wait(Barrier* barrier, int parity) {
  std::uint32_t ended;
  do {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}"
        : "=r"(ended)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (ended == 0);
}

// Release within the block only: it says that something was read, and orders no writes.
CFPO_DEVICE void arrive_peer(Barrier* barrier, int rank) {
  asm volatile(
      "{\n"
      ".reg .b32 peer;\n"
      "mapa.shared::cluster.u32 peer, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [peer];\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}
CFPO_DEVICE void send_peer(void* to, int rank, Vector v, Barrier* barrier) {
  asm volatile(
      "{\n"
      ".reg .b32 address, counter;\n"
      "mapa.shared::cluster.u32 address, %0, %2;\n"
      "mapa.shared::cluster.u32 counter, %1, %2;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 "
      "[address], {%3, %4, %5, %6}, [counter];\n"
      "}" ::"r"(shared_address(to)),
      "r"(shared_address(barrier)), "r"(rank), "r"(v.word[0]), "r"(v.word[1]), "r"(v.word[2]),
      "r"(v.word[3])
      : "memory");
}

CFPO_DEVICE void bulk_load(void* to, const void* from, int bytes, Barrier* barrier, Policy policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4;" ::"r"(shared_address(to)),
      "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
}
CFPO_DEVICE void bulk_store(void* to, const void* from, int bytes, Policy policy) {
  asm volatile(
      "cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint [%0], [%1], %2, %3;" ::"l"(
          __cvta_generic_to_global(to)),
      "r"(shared_address(from)), "r"(bytes), "l"(policy)
      : "memory");
}
CFPO_DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
CFPO_DEVICE void bulk_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
CFPO_DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

}  // namespace cfpo::cuda::hw
