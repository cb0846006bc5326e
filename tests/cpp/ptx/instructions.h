// Instructions that touch memory, or that threads of a warp, a block or a cluster meet in.
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

inline void nothing(Thread&, const Instruction&) {}
// Caches are not modelled.
inline void create_policy(Thread& t, const Instruction& i) { put<u64>(t, i, 0, 0); }

// --- Control.

inline void branch(Thread& t, const Instruction& i) { t.pc = i.target; }
inline void end(Thread& t, const Instruction&) { t.machine->end_thread(t); }
inline void trap(Thread& t, const Instruction&) { t.machine->fail("trap"); }

enum class Shuffle { kButterfly, kIndex };

// --- Warps. All lanes of the mask have to come to the same instruction.

inline Thread* lanes_of(Thread& t) {
  return t.block->threads.data() + static_cast<std::ptrdiff_t>(t.index / 32 * 32);
}
inline bool has(u32 mask, int lane) { return (mask >> lane & 1) != 0; }

// `exchange` is done once, for all lanes; the last to come does it. What is only a barrier may be
// met in several places of the code.
template <class Exchange>
inline void meet(Thread& t, const Instruction& i, bool anywhere, Exchange exchange) {
  Machine& m = *t.machine;
  const u32 mask = get<u32>(t, i, i.n_operands - 1);
  u32& met = t.block->met[static_cast<std::size_t>(t.index / 32)];
  if (!has(mask, t.index % 32)) m.fail("a lane that is not in its own mask");
  met |= 1u << t.index % 32;
  t.state = State::kMeetsWarp;
  if ((met & mask) != mask) return;
  std::vector<Thread*> together;
  for (int lane = 0; lane < 32; ++lane) {
    if (!has(mask, lane)) continue;
    Thread& other = lanes_of(t)[lane];
    const Instruction& there = m.kernel().code[static_cast<std::size_t>(other.pc - 1)];
    if (other.pc != t.pc && !(anywhere && there.execute == i.execute)) return;
    if (get<u32>(other, there, there.n_operands - 1) != mask) m.fail("lanes with other masks");
    together.push_back(&other);
  }
  exchange(mask, lanes_of(t));
  m.synchronise(together, !anywhere);
  for (Thread* other : together) other->state = State::kReady;
  met &= ~mask;
}

// d[|p], a, b, c, mask; b is the other lane, or what it differs by. c is the last lane that may be
// read, within segments that it says the size of.
inline void exchange_lanes(Thread& t, const Instruction& i, int n_results) {
  const bool butterfly = i.variant == static_cast<int>(Shuffle::kButterfly);
  meet(t, i, false, [&](u32 mask, Thread* lanes) {
    std::array<u32, 32> values{};
    u32 inside = 0;
    for (int lane = 0; lane < 32; ++lane) {
      if (!has(mask, lane)) continue;
      const int b = static_cast<int>(get<u32>(lanes[lane], i, n_results + 1) & 31);
      const int c = static_cast<int>(get<u32>(lanes[lane], i, n_results + 2));
      const int fixed = c >> 8 & 31;
      const int last = (lane & fixed) | (c & 31 & ~fixed);
      int from = butterfly ? lane ^ b : (lane & fixed) | (b & ~fixed);
      if (from <= last) {
        inside |= 1u << lane;
      } else {
        from = lane;
      }
      if (!has(mask, from)) t.machine->fail("shfl from a lane that is not there");
      values[static_cast<std::size_t>(lane)] = get<u32>(lanes[from], i, n_results);
    }
    for (int lane = 0; lane < 32; ++lane) {
      if (!has(mask, lane)) continue;
      put<u32>(lanes[lane], i, 0, values[static_cast<std::size_t>(lane)]);
      if (n_results == 2) put<u64>(lanes[lane], i, 1, has(inside, lane) ? 1 : 0);
    }
  });
}

// --- Meetings.

inline void warp_barrier(Thread& t, const Instruction& i) {
  meet(t, i, true, [](u32, Thread*) {});
}
inline void shuffle(Thread& t, const Instruction& i) { exchange_lanes(t, i, 1); }
inline void shuffle_with_predicate(Thread& t, const Instruction& i) { exchange_lanes(t, i, 2); }
inline void vote_ballot(Thread& t, const Instruction& i) {
  meet(t, i, false, [&](u32 mask, Thread* lanes) {
    u32 bits = 0;
    for (int lane = 0; lane < 32; ++lane) {
      if (has(mask, lane) && (get<u64>(lanes[lane], i, 1) & 1) != 0) bits |= 1u << lane;
    }
    for (int lane = 0; lane < 32; ++lane) {
      if (has(mask, lane)) put<u32>(lanes[lane], i, 0, bits);
    }
  });
}
inline void reduce_max(Thread& t, const Instruction& i) {
  meet(t, i, false, [&](u32 mask, Thread* lanes) {
    i32 most = std::numeric_limits<i32>::min();
    for (int lane = 0; lane < 32; ++lane) {
      if (has(mask, lane)) most = std::max(most, get<i32>(lanes[lane], i, 1));
    }
    for (int lane = 0; lane < 32; ++lane) {
      if (has(mask, lane)) put<i32>(lanes[lane], i, 0, most);
    }
  });
}

inline void block_barrier_of_all(Thread& t, const Instruction& i) {
  t.machine->arrive_at_barrier(t, get<u32>(t, i, 0), 0);
}
inline void block_barrier(Thread& t, const Instruction& i) {
  const int count = get<i32>(t, i, 1);
  if (count <= 0 || count % 32 != 0) t.machine->fail("a barrier of incomplete warps");
  t.machine->arrive_at_barrier(t, get<u32>(t, i, 0), count);
}
template <bool kRelease>
void cluster_arrive(Thread& t, const Instruction&) {
  Machine& m = *t.machine;
  if (m.launch().cluster == 0) m.fail("a cluster's barrier in a kernel launched without clusters");
  if (t.cluster_arrivals != t.cluster_waits) m.fail("a second arrival at the cluster's barrier");
  m.arrive_at_cluster(t, kRelease);
}
inline void cluster_wait(Thread& t, const Instruction&) {
  if (t.cluster_arrivals != t.cluster_waits + 1) {
    t.machine->fail("a wait at the cluster's barrier without an arrival");
  }
  ++t.cluster_waits;
  t.state = State::kClusterBarrier;
}

}  // namespace ptx
