// Other blocks, mbarriers, and what is under way on its own.
#include <algorithm>
#include <cstring>

#include "ptx/machine.h"

namespace ptx {
namespace {

constexpr std::int64_t kMostBytes = (1 << 20) - 1;  // that an mbarrier counts

}  // namespace

Block& Machine::take_peer(const Thread& t, std::uint64_t& address) {
  const std::uint64_t rank_from_1 = address >> kPeerShift;
  if (rank_from_1 == 0) return *t.block;
  address &= (1u << kPeerShift) - 1;
  if (rank_from_1 > blocks_.size()) fail("an address in no block of the cluster");
  Block& block = blocks_[rank_from_1 - 1];
  if (!block.started) fail("an access to a block that may not have begun");
  if (block.left == 0) fail("an access to a block that has ended");
  return block;
}
std::uint32_t Machine::map_peer(std::uint32_t address, std::uint32_t rank) const {
  if (launch_.cluster == 0) fail("mapa in a kernel that was launched without clusters");
  if (rank >= blocks_.size()) fail("mapa to no such rank: " + std::to_string(rank));
  return (address & ((1u << kPeerShift) - 1)) | (rank + 1) << kPeerShift;
}

void Machine::init_mbarrier(Block& block, std::size_t offset, int count) {
  if (count < 1) fail("an mbarrier of no arrivals");
  Mbarrier& barrier = block.mbarriers[offset];
  barrier = Mbarrier();
  barrier.count = barrier.pending = count;
  barrier.mark = random();
  std::memcpy(block.shared.data() + offset, &barrier.mark, sizeof barrier.mark);
}
Mbarrier& Machine::mbarrier(Block& block, std::size_t offset) const {
  const auto found = block.mbarriers.find(offset);
  if (found == block.mbarriers.end()) fail("no mbarrier was initialised there");
  if (std::memcmp(block.shared.data() + offset, &found->second.mark, 8) != 0) {
    fail("the mbarrier was overwritten");
  }
  return found->second;
}
void Machine::end_phase(Mbarrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.pending = barrier.count;
  barrier.arrived = barrier.arriving;
}
void Machine::arrive(Block& block, std::size_t offset, std::int64_t expected_bytes,
                     const Clock& clock) {
  Mbarrier& barrier = mbarrier(block, offset);
  if (barrier.pending == 0) fail("more arrivals at an mbarrier than it counts");
  barrier.bytes += expected_bytes;
  if (expected_bytes < 0 || barrier.bytes > kMostBytes) fail("an mbarrier cannot count the bytes");
  barrier.arriving.join(clock);
  --barrier.pending;
  end_phase(barrier);
}
void Machine::complete_bytes(Block& block, std::size_t offset, std::int64_t bytes,
                             const Clock& clock) {
  Mbarrier& barrier = mbarrier(block, offset);
  barrier.arriving.join(clock);
  barrier.bytes -= bytes;
  if (barrier.bytes < -kMostBytes) fail("an mbarrier cannot count the bytes");
  end_phase(barrier);
}

Clock Machine::release(Thread& t) const {
  const Clock clock = t.clock;
  if (options.races) t.clock.tick(t.index);
  return clock;
}

void Machine::start(Work work) {
  if (work.block == work.thread->block) work.clock = release(*work.thread);
  if (work.kind != Work::kStore) mbarrier(*work.block, work.mbarrier);
  if (work.kind == Work::kLoad || work.kind == Work::kSend) {
    Block& block = *work.block;
    for (std::size_t v = work.shared / 16; v < (work.shared + work.bytes) / 16; ++v) {
      const bool unfenced = block.unfenced_reads[v] != 0 || block.unfenced_writes[v] != 0;
      if (proxies() >= 2 && unfenced) {
        fail("no proxy fence after an ordinary access to bytes that are written asynchronously");
      }
    }
    begin_write(block, work.shared, work.bytes);
    if (options.races) block.races.forget(work.shared, work.bytes);
  }
  work_.push_back(std::move(work));
  const bool now = options.async == Async::kRandom && one_in(4);
  if (now || options.async == Async::kImmediate) finish(work_.size() - 1, true);
}

void Machine::finish(std::size_t index, bool wholly) {
  finishing_ = &work_[index].text;
  const bool done = advance(work_[index], wholly);
  finishing_ = nullptr;
  if (done) work_.erase(work_.begin() + static_cast<std::ptrdiff_t>(index));
}

// Does some of it, or all; whether that was the last.
bool Machine::advance(Work& work, bool wholly) {
  Block& block = *work.block;
  if (work.kind == Work::kStore) {
    if (!work.was_read) {
      const char* from = block.shared.data() + work.shared;
      work.data.assign(from, from + work.bytes);
      work.was_read = true;
      --work.thread->unread_stores;
      if (!wholly) return false;
    }
    std::memcpy(work.to, work.data.data(), work.bytes);
  } else if (work.kind == Work::kLoad) {
    std::size_t pieces = wholly ? work.pieces.size() : 1 + random() % 64;
    for (; pieces > 0 && !work.pieces.empty(); --pieces) {
      const std::size_t at = work.pieces.back();
      work.pieces.pop_back();
      land(block, work.shared + at, work.from + at, 16);
    }
    if (!work.pieces.empty()) return false;
    complete_bytes(block, work.mbarrier, static_cast<std::int64_t>(work.bytes), work.clock);
  } else if (work.kind == Work::kSend) {
    land(block, work.shared, work.data.data(), work.bytes);
    complete_bytes(block, work.mbarrier, static_cast<std::int64_t>(work.bytes), work.clock);
  } else {
    arrive(block, work.mbarrier, 0, work.clock);
  }
  return true;
}

}  // namespace ptx
