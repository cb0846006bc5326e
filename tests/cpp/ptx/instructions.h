// Instructions that touch memory, or that threads wait for each other in.
#pragma once

#include <algorithm>

#include "ptx/values.h"

namespace ptx {

// --- Memory. An address is two operands.

inline u64 address_at(const Thread& t, const Instruction& i, int n) {
  return get<u64>(t, i, n) + get<u64>(t, i, n + 1);
}
// Of shared memory only 32 bits count.
inline u64 address_in(Space space, const Thread& t, const Instruction& i, int n) {
  const u64 address = address_at(t, i, n);
  return space == Space::kShared ? address & 0xFFFFFFFF : address;
}
// A register that is wider than T holds T with its sign.
template <class T>
using Loaded = std::conditional_t<std::is_same_v<T, i8>, i32, T>;
template <class T, Space kSpace, int kElements>
void load(Thread& t, const Instruction& i) {
  const char* p = read(t, kSpace, address_in(kSpace, t, i, kElements), sizeof(T) * kElements);
  for (int k = 0; k < kElements; ++k) {
    T x;
    std::memcpy(&x, p + sizeof(T) * k, sizeof(T));
    put<Loaded<T>>(t, i, k, x);
  }
}
template <class T, Space kSpace, int kElements>
void store(Thread& t, const Instruction& i) {
  char bytes[sizeof(T) * kElements];
  for (int k = 0; k < kElements; ++k) {
    const T x = get<T>(t, i, 2 + k);
    std::memcpy(bytes + sizeof(T) * k, &x, sizeof(T));
  }
  write(t, kSpace, address_in(kSpace, t, i, 0), bytes, sizeof bytes);
}

void map_address(Thread& t, const Instruction& i);
void fence_async_proxy(Thread& t, const Instruction& i);
inline void nothing(Thread&, const Instruction&) {}
// Caches are not modelled.
inline void create_policy(Thread& t, const Instruction& i) { put<u64>(t, i, 0, 0); }

// --- Control.

inline void branch(Thread& t, const Instruction& i) { t.pc = i.target; }
inline void end(Thread& t, const Instruction&) { t.machine->end_thread(t); }
inline void trap(Thread& t, const Instruction&) { t.machine->fail("trap"); }

// --- Warps, blocks, clusters.

enum class Shuffle { kButterfly, kIndex };
void warp_barrier(Thread& t, const Instruction& i);
void shuffle(Thread& t, const Instruction& i);  // `variant` is a Shuffle
void shuffle_with_predicate(Thread& t, const Instruction& i);
void vote_ballot(Thread& t, const Instruction& i);
void reduce_max(Thread& t, const Instruction& i);
void block_barrier_of_all(Thread& t, const Instruction& i);
void block_barrier(Thread& t, const Instruction& i);
void cluster_arrive(Thread& t, const Instruction& i);
void cluster_wait(Thread& t, const Instruction& i);

// --- mbarriers.

void mbarrier_init(Thread& t, const Instruction& i);
void mbarrier_arrive(Thread& t, const Instruction& i);
void mbarrier_arrive_expecting(Thread& t, const Instruction& i);
void mbarrier_expect(Thread& t, const Instruction& i);
void mbarrier_arrive_peer(Thread& t, const Instruction& i);
void mbarrier_try_wait(Thread& t, const Instruction& i);

// --- Asynchronous copies.

void copy_async16(Thread& t, const Instruction& i);
void commit_copies(Thread& t, const Instruction& i);
void wait_copies(Thread& t, const Instruction& i);
void bulk_load(Thread& t, const Instruction& i);
void bulk_store(Thread& t, const Instruction& i);
void commit_bulk(Thread& t, const Instruction& i);
void wait_bulk_read(Thread& t, const Instruction& i);
void store_async(Thread& t, const Instruction& i);

}  // namespace ptx
