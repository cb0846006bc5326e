// Which fibre of machine.h runs when: warps, blocks and clusters, in the order that the test chose.
#pragma once

#include "emulation/machine.h"

namespace emulation {

// Lets a warp go on if all of it has come to the same meeting.
inline bool release_warp(Block& block, std::size_t first) {
  const Meeting meeting = block.threads[first].waits_at;
  for (std::size_t i = first; i < first + kWarp; ++i) {
    const Thread& thread = block.threads[i];
    if (thread.done || thread.waits_at == Meeting::kNone) return false;
    if (thread.waits_at == Meeting::kPoll || meeting == Meeting::kPoll) return false;
    if (thread.waits_at != meeting) {
      if (thread.waits_at == Meeting::kBlockSync || meeting == Meeting::kBlockSync) return false;
      fail("the lanes of a warp met at different places");
    }
  }
  if (meeting == Meeting::kBlockSync) return false;
  for (std::size_t i = first; i < first + kWarp; ++i) {
    block.threads[i].waits_at = Meeting::kNone;
  }
  return true;
}

// The same for a block; threads that have left do not count, as on the GPU.
inline bool release_block(Block& block) {
  if (block.left == 0) return false;
  for (const Thread& thread : block.threads) {
    if (!thread.done && thread.waits_at != Meeting::kBlockSync) return false;
  }
  for (Thread& thread : block.threads) thread.waits_at = Meeting::kNone;
  return true;
}

// Runs the lanes that can run; whether there were any.
inline bool run_warp(Block& block, int first) {
  Machine& m = machine();
  bool moved = release_warp(block, static_cast<std::size_t>(first));
  std::array<int, kWarp> turn;
  for (int i = 0; i < kWarp; ++i) turn[i] = m.order == Order::kBackward ? kWarp - 1 - i : i;
  if (m.order == Order::kShuffled) std::shuffle(turn.begin(), turn.end(), m.random);
  for (const int lane : turn) {
    Thread& thread = block.threads[first + lane];
    if (thread.done) continue;
    if (thread.waits_at == Meeting::kPoll && thread.ready()) thread.waits_at = Meeting::kNone;
    if (thread.waits_at != Meeting::kNone) continue;
    block.started = true;
    switch_to_thread(thread);
    moved = true;
    block.left -= thread.done ? 1 : 0;
  }
  return moved;
}

inline void begin_block(Block& block, int threads, std::size_t shared_bytes) {
  block.threads.resize(threads);
  block.shared_bytes = shared_bytes;
  void* shared = nullptr;
  if (posix_memalign(&shared, 128, shared_bytes) != 0) fail("out of memory");
  block.shared.reset(static_cast<char*>(shared));
  std::memset(block.shared.get(), 0xFF, shared_bytes);
  block.writers.assign((shared_bytes + 15) / 16, 0);
  block.readers.assign((shared_bytes + 15) / 16, 0);
  block.barriers.clear();
  block.started = false;
  block.left = threads;
  for (auto& slots : block.exchange) slots.assign(threads, 0);
  for (int i = 0; i < threads; ++i) prepare(block.threads[i], block, i);
}

inline void run_cluster(int threads, std::size_t shared_bytes) {
  Machine& m = machine();
  for (Block& block : m.cluster) begin_block(block, threads, shared_bytes);
  const int warps = threads / kWarp, all = warps * static_cast<int>(m.cluster.size());
  std::vector<int> turn(all);
  for (int i = 0; i < all; ++i) turn[i] = m.order == Order::kBackward ? all - 1 - i : i;
  const int starved = m.order == Order::kStarved ? static_cast<int>(m.random() % all) : -1;
  const auto running = [](const Block& block) { return block.left > 0; };
  while (std::any_of(m.cluster.begin(), m.cluster.end(), running)) {
    bool moved = false;
    if (m.order == Order::kShuffled) std::shuffle(turn.begin(), turn.end(), m.random);
    for (int i = 0; i < all; ++i) {
      Block& block = m.cluster[turn[i] / warps];
      // As far as it goes, ahead of all others; shuffled, only to its next meeting.
      while (turn[i] != starved && run_warp(block, turn[i] % warps * kWarp)) {
        moved = true;
        if (m.order == Order::kShuffled) break;
      }
      // The same for a block, whose warps come one after another.
      if (m.order != Order::kShuffled && (i + 1) % warps == 0 && release_block(block)) {
        moved = true;
        i -= warps;
      }
    }
    if (m.order == Order::kShuffled) {
      for (Block& block : m.cluster) moved |= release_block(block);
    }
    if (!moved && starved >= 0) {
      moved = run_warp(m.cluster[starved / warps], starved % warps * kWarp);
    }
    if (!moved) fail("deadlock: threads wait for others that left or wait elsewhere");
  }
}

// `cluster` consecutive blocks of x form a cluster; 0: there are none.
inline void run_grid(long blocks, int blocks_y, int cluster, int threads, std::size_t shared_bytes,
                     std::function<void()> body) {
  if (threads % kWarp != 0) fail("a block must consist of whole warps");
  const int together = std::max(cluster, 1);
  if (blocks % together != 0) fail("a grid must consist of whole clusters");
  Machine& m = machine();
  m.block_count = blocks;
  m.block_count_y = blocks_y;
  m.cluster_size = cluster;
  m.body = std::move(body);
  m.cluster.resize(together);
  for (int y = 0; y < blocks_y; ++y) {
    for (long x = 0; x < blocks; x += together) {
      for (int rank = 0; rank < together; ++rank) {
        m.cluster[rank].index = (m.order == Order::kBackward ? blocks - together - x : x) + rank;
        m.cluster[rank].index_y = m.order == Order::kBackward ? blocks_y - 1 - y : y;
      }
      run_cluster(threads, shared_bytes);
    }
  }
}

}  // namespace emulation
