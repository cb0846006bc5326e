#include "ptx/instructions.h"

namespace ptx {
namespace {

// --- Warps. All lanes of the mask have to come to the same instruction.

Thread* lanes_of(Thread& t) {
  return t.block->threads.data() + static_cast<std::ptrdiff_t>(t.index / 32 * 32);
}
bool has(u32 mask, int lane) { return (mask >> lane & 1) != 0; }

// `exchange` is done once, for all lanes; the last to come does it. What is only a barrier may be
// met in several places of the code.
template <class Exchange>
void meet(Thread& t, const Instruction& i, bool anywhere, Exchange exchange) {
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
void exchange_lanes(Thread& t, const Instruction& i, int n_results) {
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

// --- Asynchronous work.

std::size_t mbarrier_offset(const Thread& t, const Block& block, u64 address) {
  return shared_offset(t, block, address, 8, 8);
}
u64 shared_address_at(const Thread& t, const Instruction& i, int n) {
  return address_in(Space::kShared, t, i, n);
}

Work begin_work(Work::Kind kind, Thread& t, Block& block) {
  Work work;
  work.kind = kind, work.block = &block, work.thread = &t;
  work.text = t.machine->text_of(t);
  return work;
}
void check_bulk(const Thread& t, u64 shared, u64 global, u32 bytes) {
  if (bytes == 0 || bytes % 16 != 0 || bytes >= 1u << 20) {
    t.machine->fail("a bulk copy of " + std::to_string(bytes) + " bytes");
  }
  if (shared % 16 != 0 || global % 16 != 0) t.machine->fail("a misaligned bulk copy");
}

}  // namespace

void warp_barrier(Thread& t, const Instruction& i) {
  meet(t, i, true, [](u32, Thread*) {});
}
void shuffle(Thread& t, const Instruction& i) { exchange_lanes(t, i, 1); }
void shuffle_with_predicate(Thread& t, const Instruction& i) { exchange_lanes(t, i, 2); }
void vote_ballot(Thread& t, const Instruction& i) {
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
void reduce_max(Thread& t, const Instruction& i) {
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

void block_barrier_of_all(Thread& t, const Instruction& i) {
  t.machine->arrive_at_barrier(t, get<u32>(t, i, 0), 0);
}
void block_barrier(Thread& t, const Instruction& i) {
  const int count = get<i32>(t, i, 1);
  if (count <= 0 || count % 32 != 0) t.machine->fail("a barrier of incomplete warps");
  t.machine->arrive_at_barrier(t, get<u32>(t, i, 0), count);
}
void cluster_arrive(Thread& t, const Instruction&) {
  Machine& m = *t.machine;
  if (m.launch().cluster == 0) m.fail("a cluster's barrier in a kernel launched without clusters");
  if (t.cluster_arrivals != t.cluster_waits) m.fail("a second arrival at the cluster's barrier");
  m.arrive_at_cluster(t);
}
void cluster_wait(Thread& t, const Instruction&) {
  if (t.cluster_arrivals != t.cluster_waits + 1) {
    t.machine->fail("a wait at the cluster's barrier without an arrival");
  }
  ++t.cluster_waits;
  t.state = State::kClusterBarrier;
}

void map_address(Thread& t, const Instruction& i) {
  put<u32>(t, i, 0, t.machine->map_peer(get<u32>(t, i, 1), get<u32>(t, i, 2)));
}
void fence_async_proxy(Thread& t, const Instruction&) { fence_proxy(t); }

// [address], count
void mbarrier_init(Thread& t, const Instruction& i) {
  const std::size_t at = mbarrier_offset(t, *t.block, shared_address_at(t, i, 0));
  t.machine->init_mbarrier(*t.block, at, get<i32>(t, i, 2));
}
namespace {
void arrive_in_block(Thread& t, const Instruction& i, i64 bytes) {
  const std::size_t at = mbarrier_offset(t, *t.block, shared_address_at(t, i, 1));
  t.machine->arrive(*t.block, at, bytes, t.machine->release(t));
}
}  // namespace
// _, [address]
void mbarrier_arrive(Thread& t, const Instruction& i) { arrive_in_block(t, i, 0); }
// _, [address], bytes
void mbarrier_arrive_expecting(Thread& t, const Instruction& i) {
  arrive_in_block(t, i, get<i32>(t, i, 3));
}
// [address], bytes
void mbarrier_expect(Thread& t, const Instruction& i) {
  const std::size_t at = mbarrier_offset(t, *t.block, shared_address_at(t, i, 0));
  t.machine->complete_bytes(*t.block, at, -i64{get<i32>(t, i, 2)}, {});
}
// _, [address] of shared::cluster
void mbarrier_arrive_peer(Thread& t, const Instruction& i) {
  u64 address = shared_address_at(t, i, 1);
  Block& block = t.machine->take_peer(t, address);
  Work work = begin_work(Work::kArrive, t, block);
  work.mbarrier = mbarrier_offset(t, block, address);
  t.machine->start(std::move(work));
}
// p, [address], parity. It may say no early, some times.
void mbarrier_try_wait(Thread& t, const Instruction& i) {
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
void copy_async16(Thread& t, const Instruction& i) {
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
void commit_copies(Thread& t, const Instruction&) { ++t.copy_group; }
// At most so many of the thread's last groups are under way afterwards.
void wait_copies(Thread& t, const Instruction& i) {
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
void bulk_load(Thread& t, const Instruction& i) {
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
void bulk_store(Thread& t, const Instruction& i) {
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
void commit_bulk(Thread& t, const Instruction&) { ++t.bulk_group; }
// At most so many groups have not read their bytes afterwards; what was read may be written later.
void wait_bulk_read(Thread& t, const Instruction& i) {
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
void store_async(Thread& t, const Instruction& i) {
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
