// Instructions of mbarriers and of asynchronous copies.
#pragma once

#include "ptx/instructions.h"

namespace ptx {

inline std::size_t mbarrier_offset(const Thread& t, const Block& block, u64 address) {
  return shared_offset(t, block, address, 8, 8);
}
inline u64 shared_address_at(const Thread& t, const Instruction& i, int n) {
  return address_in(Space::kShared, t, i, n);
}

inline Work begin_work(Work::Kind kind, Thread& t, Block& block) {
  Work work;
  work.kind = kind, work.block = &block, work.thread = &t;
  work.text = t.machine->text_of(t);
  return work;
}
inline void check_bulk(const Thread& t, u64 shared, u64 global, u32 bytes) {
  if (bytes == 0 || bytes % 16 != 0 || bytes >= 1u << 20) {
    t.machine->fail("a bulk copy of " + std::to_string(bytes) + " bytes");
  }
  if (shared % 16 != 0 || global % 16 != 0) t.machine->fail("a misaligned bulk copy");
}

inline void map_address(Thread& t, const Instruction& i) {
  put<u32>(t, i, 0, t.machine->map_peer(get<u32>(t, i, 1), get<u32>(t, i, 2)));
}
inline void fence_async_proxy(Thread& t, const Instruction&) { fence_proxy(t); }

// [address], count
inline void mbarrier_init(Thread& t, const Instruction& i) {
  const std::size_t at = mbarrier_offset(t, *t.block, shared_address_at(t, i, 0));
  t.machine->init_mbarrier(*t.block, at, get<i32>(t, i, 2));
}
inline void arrive_in_block(Thread& t, const Instruction& i, i64 bytes) {
  const std::size_t at = mbarrier_offset(t, *t.block, shared_address_at(t, i, 1));
  t.machine->arrive(*t.block, at, bytes, t.machine->release(t));
}
// _, [address]
inline void mbarrier_arrive(Thread& t, const Instruction& i) { arrive_in_block(t, i, 0); }
// _, [address], bytes
inline void mbarrier_arrive_expecting(Thread& t, const Instruction& i) {
  arrive_in_block(t, i, get<i32>(t, i, 3));
}
// [address], bytes
inline void mbarrier_expect(Thread& t, const Instruction& i) {
  const std::size_t at = mbarrier_offset(t, *t.block, shared_address_at(t, i, 0));
  t.machine->complete_bytes(*t.block, at, -i64{get<i32>(t, i, 2)}, {});
}
// _, [address] of shared::cluster
inline void mbarrier_arrive_peer(Thread& t, const Instruction& i) {
  u64 address = shared_address_at(t, i, 1);
  Block& block = t.machine->take_peer(t, address);
  Work work = begin_work(Work::kArrive, t, block);
  work.mbarrier = mbarrier_offset(t, block, address);
  t.machine->start(std::move(work));
}
// p, [address], parity. It may say no early, some times.
inline void mbarrier_try_wait(Thread& t, const Instruction& i) {
  Machine& m = *t.machine;
  const std::size_t at = mbarrier_offset(t, *t.block, shared_address_at(t, i, 1));
  const u32 parity = get<u32>(t, i, 3);
  if (parity > 1) m.fail("a parity that is neither 0 nor 1");
  const Mbarrier& barrier = m.mbarrier(*t.block, at);
  const bool ended = (barrier.phase & 1) != parity;
  put<u64>(t, i, 0, ended ? 1 : 0);
  if (!ended && t.poll.early < 2 && m.one_in(3)) {
    ++t.poll.early;
    return;
  }
  t.poll = {at, parity, i.operands[0], 0};
  if (!ended) t.state = State::kMbarrier;
  if (ended && m.options.races) t.clock.join(barrier.arrived);
}

// [to], [from], 16, policy
inline void copy_async16(Thread& t, const Instruction& i) {
  Machine& m = *t.machine;
  const u64 from = address_at(t, i, 2);
  if (get<u32>(t, i, 4) != 16 || from % 16 != 0) m.fail("cp.async.cg of other than 16 bytes");
  const std::size_t to = shared_offset(t, *t.block, shared_address_at(t, i, 0), 16, 16);
  const char* source = global_memory(t, from, 16, false);
  check_race(t, to, 16, true);
  if (m.options.async == Async::kImmediate || (m.options.async == Async::kRandom && m.one_in(3))) {
    land(*t.block, to, source, 16);
  } else {
    begin_write(*t.block, to, 16);
    t.copies.push_back({to, source, t.copy_group});
  }
}
inline void commit_copies(Thread& t, const Instruction&) { ++t.copy_group; }
// At most so many of the thread's last groups are under way afterwards.
inline void wait_copies(Thread& t, const Instruction& i) {
  const int pending = get<i32>(t, i, 0);
  const auto waited = std::stable_partition(
      t.copies.begin(), t.copies.end(),
      [&](const Thread::Copy& copy) { return copy.group < t.copy_group - pending; });
  for (auto copy = t.copies.begin(); copy != waited; ++copy) {
    check_race(t, copy->to, 16, true);
    land(*t.block, copy->to, copy->from, 16);
  }
  t.copies.erase(t.copies.begin(), waited);
}

// [to], [from], bytes, [mbarrier], policy
inline void bulk_load(Thread& t, const Instruction& i) {
  Machine& m = *t.machine;
  u64 to = shared_address_at(t, i, 0), mbarrier = shared_address_at(t, i, 5);
  const u64 from = address_at(t, i, 2);
  const u32 bytes = get<u32>(t, i, 4);
  check_bulk(t, to, from, bytes);
  Block& block = m.take_peer(t, to);
  if (&block != &m.take_peer(t, mbarrier)) m.fail("a bulk copy that another block counts");
  Work work = begin_work(Work::kLoad, t, block);
  work.shared = shared_offset(t, block, to, bytes, 16);
  work.bytes = bytes;
  work.from = global_memory(t, from, bytes, false);
  work.mbarrier = mbarrier_offset(t, block, mbarrier);
  for (std::size_t at = 0; at < bytes; at += 16) work.pieces.push_back(at);
  for (std::size_t k = work.pieces.size(); k > 1; --k) {
    std::swap(work.pieces[k - 1], work.pieces[m.random() % k]);
  }
  m.start(std::move(work));
}
// [to], [from], bytes, policy
inline void bulk_store(Thread& t, const Instruction& i) {
  Machine& m = *t.machine;
  const u64 to = address_at(t, i, 0), from = shared_address_at(t, i, 2);
  const u32 bytes = get<u32>(t, i, 4);
  check_bulk(t, from, to, bytes);
  Work work = begin_work(Work::kStore, t, *t.block);
  work.shared = shared_offset(t, *t.block, from, bytes, 16);
  work.bytes = bytes;
  work.to = global_memory(t, to, bytes, true);
  work.group = t.bulk_group;
  check_content(t, *t.block, work.shared, bytes);
  const auto unfenced =
      t.block->unfenced_writes.begin() + static_cast<std::ptrdiff_t>(work.shared / 16);
  const auto end = unfenced + bytes / 16;
  if (std::find_if(unfenced, end, [](int writers) { return writers != 0; }) != end) {
    m.fail("a bulk store of bytes that their writer has not fenced");
  }
  ++t.unread_stores;
  m.start(std::move(work));
}
inline void commit_bulk(Thread& t, const Instruction&) { ++t.bulk_group; }
// At most so many groups have not read their bytes afterwards; what was read may be written later.
inline void wait_bulk_read(Thread& t, const Instruction& i) {
  const int until = t.bulk_group - get<i32>(t, i, 0);
  std::vector<Work>& work = t.machine->work();
  for (std::size_t k = work.size(); k-- > 0;) {
    if (work[k].kind == Work::kStore && work[k].thread == &t && work[k].group < until &&
        !work[k].was_read) {
      t.machine->finish(k, false);
    }
  }
}
// [to], {4 words}, [mbarrier]
inline void store_async(Thread& t, const Instruction& i) {
  Machine& m = *t.machine;
  u64 to = shared_address_at(t, i, 0), mbarrier = shared_address_at(t, i, 6);
  Block& block = m.take_peer(t, to);
  if (&block != &m.take_peer(t, mbarrier)) m.fail("a st.async that another block counts");
  Work work = begin_work(Work::kSend, t, block);
  work.bytes = 16;
  work.shared = shared_offset(t, block, to, work.bytes, 16);
  work.mbarrier = mbarrier_offset(t, block, mbarrier);
  for (int k = 2; k < 6; ++k) {
    const u32 word = get<u32>(t, i, k);
    const char* bytes = reinterpret_cast<const char*>(&word);
    work.data.insert(work.data.end(), bytes, bytes + sizeof word);
  }
  m.start(std::move(work));
}

}  // namespace ptx
