// Clusters of blocks, mbarriers and bulk copies for machine.h.
//
// Bulk copies are as late as the hardware may make them: a load spoils its target when it starts
// and lands when the phase that counts it is waited for; a store lands when it is waited for, and
// its bytes must not have changed. A copy from or over bytes that a thread has not fenced, an
// access to a block that has not begun or has ended, a misaligned or odd-sized copy are errors.
#pragma once

#include "emulation/proxies.h"

namespace emulation {

inline void wait_until(std::function<bool()> ready) {
  if (ready()) return;
  current().ready = std::move(ready);
  wait_at(Meeting::kPoll);
}

// A launch without clusters is one of single blocks by the manual, but no kernel relies on it.
inline int cluster_size() {
  const int size = machine().cluster_size;
  if (size == 0) fail("what needs a cluster, in a kernel that was launched without");
  return size;
}

// Threads that have left count as having arrived.
inline void cluster_wait() {
  cluster_size();
  const int own = current().cluster_arrivals;
  wait_until([own] {
    for (const Block& block : machine().cluster) {
      for (const Thread& thread : block.threads) {
        if (!thread.done && thread.cluster_arrivals < own) return false;
      }
    }
    return true;
  });
}

inline Block& running_peer(int rank) {
  if (rank < 0 || rank >= cluster_size()) fail("a message to no block of the cluster");
  Block& peer = machine().cluster[rank];
  if (!peer.started) fail("a message to a block that has not begun");
  if (peer.left == 0) fail("a message to a block that has ended");
  return peer;
}
inline void* in_peer(const Block& peer, const void* p, std::size_t bytes) {
  return peer.shared.get() + shared_offset(p, bytes);
}

// The block's first `count` threads meet.
inline void sync_threads(int count) {
  const Block& block = *current().block;
  if (current().index >= count) fail("a barrier of other threads");
  const int own = ++current().syncs;
  wait_until([&block, own, count] {
    return std::all_of(block.threads.begin(), block.threads.begin() + count,
                       [own](const Thread& thread) { return thread.syncs >= own; });
  });
}

inline void barrier_init(void* p, int count) {
  shared_offset(p, 8);
  if (reinterpret_cast<std::uintptr_t>(p) % 8 != 0) fail("a misaligned barrier");
  Barrier barrier;
  barrier.count = barrier.pending = count;
  current().block->barriers[p] = barrier;
}
inline Barrier& barrier_at(Block& block, const void* p) {
  const auto found = block.barriers.find(p);
  if (found == block.barriers.end()) fail("a barrier that was not initialised");
  return found->second;
}
inline Barrier& barrier_at(const void* p) { return barrier_at(*current().block, p); }
inline void end_phase_if_complete(Barrier& barrier) {
  std::size_t bytes = 0;
  for (const BulkCopy& copy : barrier.copies) bytes += copy.bytes;
  if (barrier.pending > 0 || bytes != barrier.expected) return;
  for (const BulkCopy& copy : barrier.copies) land(copy);
  barrier.copies.clear();
  barrier.expected = 0;
  barrier.pending = barrier.count;
  ++barrier.phase;
}
inline void arrive_at(Barrier& barrier, std::size_t bytes) {
  if (barrier.pending == 0) end_phase_if_complete(barrier);
  if (barrier.pending == 0) fail("more arrivals at a barrier than it counts");
  --barrier.pending;
  barrier.expected += bytes;
}
inline void barrier_arrive(void* p, std::size_t bytes) { arrive_at(barrier_at(p), bytes); }
inline void arrive_peer(void* p, int rank) {
  Block& peer = running_peer(rank);
  arrive_at(barrier_at(peer, in_peer(peer, p, 8)), 0);
}
inline void barrier_wait(void* p, int parity) {
  Barrier& barrier = barrier_at(p);
  wait_until([&barrier, parity] {
    if (static_cast<int>(barrier.phase & 1) == parity) end_phase_if_complete(barrier);
    return static_cast<int>(barrier.phase & 1) != parity;
  });
}

inline void check_bulk(const void* global, const void* shared, std::size_t bytes) {
  check_aligned(global);
  check_aligned(shared);
  shared_offset(shared, bytes);
  if (bytes % 16 != 0 || bytes == 0) fail("a bulk copy of an odd size");
}
// Spoils its target when it starts, like a load, and lands with it.
inline void send_peer(void* p, int rank, const void* x, std::size_t bytes, void* counter) {
  Block& peer = running_peer(rank);
  check_aligned(p);
  void* to = in_peer(peer, p, bytes);
  check_left(peer, shared_offset(p, bytes), bytes, "a message");
  Barrier& barrier = barrier_at(peer, in_peer(peer, counter, 8));
  end_phase_if_complete(barrier);
  spoil(to, bytes);
  const char* begin = static_cast<const char*>(x);
  barrier.copies.push_back({to, nullptr, bytes, {begin, begin + bytes}});
}
inline void bulk_load(void* to, const void* from, std::size_t bytes, void* barrier) {
  check_bulk(from, to, bytes);
  check_left(*current().block, shared_offset(to, bytes), bytes, "a bulk load");
  spoil(to, bytes);
  barrier_at(barrier).copies.push_back({to, from, bytes, {}});
}
inline void bulk_store(void* to, const void* from, std::size_t bytes) {
  check_bulk(to, from, bytes);
  check_written(*current().block, shared_offset(from, bytes), bytes);
  current().open_bulk_stores.push_back({to, from, bytes, seen(from, bytes)});
}
inline void bulk_commit() {
  Thread& thread = current();
  thread.bulk_stores.push_back(std::move(thread.open_bulk_stores));
  thread.open_bulk_stores.clear();
}
inline void bulk_wait_read() {
  Thread& thread = current();
  for (const auto& group : thread.bulk_stores) {
    for (const BulkCopy& copy : group) {
      if (seen(copy.from, copy.bytes) != copy.seen) {
        fail("bytes changed while a bulk store read them");
      }
      std::memcpy(copy.to, copy.seen.data(), copy.bytes);
    }
  }
  thread.bulk_stores.clear();
}

}  // namespace emulation
