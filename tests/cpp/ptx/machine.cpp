// Which thread runs when, and how threads wait for each other.
#include "ptx/machine.h"

#include <algorithm>
#include <limits>

namespace ptx {
namespace {

// More in one go, without waiting for anything, is endless.
constexpr int kMostInOneGo = 1 << 24;

std::size_t size_of_warp(const Block& block, std::size_t warp) {
  return std::min<std::size_t>(32, block.threads.size() - 32 * warp);
}

}  // namespace

std::uint64_t Machine::random() {
  random_ ^= random_ << 13, random_ ^= random_ >> 7, random_ ^= random_ << 17;
  return random_ * 2685821657736338717ull >> 16;
}

const std::string& Machine::text_of(const Thread& t) const {
  return kernel_->sources[static_cast<std::size_t>(std::max(0, t.pc - 1))].text;
}

void Machine::fail(const std::string& what) const {
  if (finishing_ != nullptr) throw Error("ptx: " + what + "\n  when this was done: " + *finishing_);
  if (current_ == nullptr) throw Error("ptx: " + what);
  const Source& at = kernel_->sources[static_cast<std::size_t>(std::max(0, current_->pc - 1))];
  const auto& id = current_->block->id;
  throw Error("ptx: " + what + "\n  block " + std::to_string(id[0]) + "," + std::to_string(id[1]) +
              " thread " + std::to_string(current_->index) + ", line " + std::to_string(at.line) +
              " of " + kernel_->name + ": " + at.text);
}

std::uint64_t Machine::special(const std::string& name, const Block& block, unsigned thread) const {
  const auto& [x, y, z] = launch_.block;
  const std::array<unsigned, 3> tid{thread % x, thread / x % y, thread / x / y};
  const unsigned cluster = std::max(1u, launch_.cluster);
  const std::string axes = "xyz";
  const auto axis = axes.find(name.back());
  const std::string of_axis = axis < 3 ? name.substr(0, name.size() - 2) : "";
  if (of_axis == "%tid") return tid[axis];
  if (of_axis == "%ntid") return launch_.block[axis];
  if (of_axis == "%ctaid") return block.id[axis];
  if (of_axis == "%nctaid") return launch_.grid[axis];
  if (name == "%cluster_ctarank") return block.rank;
  if (name == "%cluster_nctarank") return cluster;
  throw Error("ptx: unknown register " + name);
}

void Machine::begin_block(Block& block, std::array<unsigned, 3> id, unsigned rank) {
  const std::size_t n = launch_.block[0] * launch_.block[1] * launch_.block[2];
  const auto n_registers = static_cast<std::size_t>(kernel_->n_registers);
  block.id = id, block.rank = rank;
  block.shared.assign(launch_.shared, static_cast<char>(0xFF));
  block.content.assign(launch_.shared, Content::kNothing);
  block.unfenced_reads.assign(launch_.shared / 16 + 1, 0);
  block.unfenced_writes.assign(launch_.shared / 16 + 1, 0);
  if (options.races) block.races.reset(launch_.shared);
  // NaNs, as 16, 32 and 64 bits.
  const std::uint64_t garbage = random() | 0x7FF8000000000000ull | 0x7FC07FC0u;
  block.registers.assign(n_registers * n, garbage);
  block.threads.assign(n, Thread());
  block.met.assign((n + 31) / 32, 0);
  block.barriers = {};
  block.mbarriers.clear();
  block.cluster_arriving = block.cluster_arrived = Clock();
  block.left = static_cast<int>(n);
  block.started = false;
  for (unsigned i = 0; i < n; ++i) {
    Thread& t = block.threads[i];
    t.registers = block.registers.data() + i * n_registers;
    t.constants = kernel_->constants.data();
    t.block = &block, t.machine = this, t.index = static_cast<int>(i);
    if (options.races) t.clock.begin(n, i);
    for (const auto& [name, reg] : kernel_->specials) t.registers[reg] = special(name, block, i);
  }
}

void Machine::run(const Kernel& kernel, const Launch& launch) {
  kernel_ = &kernel, launch_ = launch;
  const unsigned n = launch.block[0] * launch.block[1] * launch.block[2];
  const unsigned together = std::max(1u, launch.cluster);
  current_ = nullptr, finishing_ = nullptr;
  instructions_ = 0;
  random_ = (options.seed + options.schedule * 7919) * 0x9E3779B97F4A7C15ull | 1;
  if (n == 0 || n > static_cast<unsigned>(kernel.max_threads)) fail("a block of that many threads");
  if (launch.params.size() != kernel.param_bytes) fail("parameters of another size");
  if (launch.grid[0] % together != 0) fail("a grid has to consist of whole clusters");
  work_.clear();
  blocks_.resize(together);
  const auto turn = [&](unsigned i, unsigned count) {
    return options.order == Order::kBackward ? count - 1 - i : i;
  };
  const unsigned clusters = launch.grid[0] / together;
  for (unsigned z = 0; z < launch.grid[2]; ++z) {
    for (unsigned y = 0; y < launch.grid[1]; ++y) {
      for (unsigned x = 0; x < clusters; ++x) {
        for (unsigned rank = 0; rank < together; ++rank) {
          begin_block(blocks_[rank],
                      {turn(x, clusters) * together + rank, turn(y, launch.grid[1]), z}, rank);
        }
        run_cluster();
      }
    }
  }
  while (!work_.empty()) finish(work_.size() - 1, true);  // stores that have been read
}

bool Machine::wake(Thread& t) {
  if (t.state == State::kMbarrier) {
    current_ = &t;
    const Mbarrier& barrier = mbarrier(*t.block, t.poll.mbarrier);
    if ((barrier.phase & 1) == t.poll.parity) return false;
    t.registers[t.poll.result] = 1;
    if (options.races) t.clock.join(barrier.arrived);
    t.state = State::kReady;
  } else if (t.state == State::kClusterBarrier && cluster_phase_ >= t.cluster_waits) {
    if (options.races) t.clock.join(t.block->cluster_arrived);
    t.state = State::kReady;
  }
  return t.state == State::kReady;
}

// Until it waits; where the order is random perhaps less.
void Machine::run_thread(Thread& t) {
  int left = kMostInOneGo;
  if (options.order == Order::kShuffled && one_in(4)) left = 1 + static_cast<int>(random() % 100);
  const int at_first = left;
  const Instruction* code = kernel_->code.data();
  current_ = &t;
  while (t.state == State::kReady && left > 0) {
    const Instruction& i = code[t.pc++];
    --left;
    if (i.guard >= 0 && ((t.registers[i.guard] & 1) != 0) != i.guard_is) continue;
    i.execute(t, i);
  }
  if (at_first == kMostInOneGo && left == 0) {
    ++t.pc;  // named is what would come next
    fail("a thread that waits for nothing never ends");
  }
  instructions_ += static_cast<std::uint64_t>(at_first - left);
  current_ = nullptr;
}

bool Machine::run_warp(Block& block, std::size_t warp) {
  bool moved = false;
  const std::size_t n = size_of_warp(block, warp);
  const std::size_t twist = options.order == Order::kShuffled && n == 32 ? random() % 32 : 0;
  for (std::size_t i = 0; i < n; ++i) {
    const std::size_t lane = options.order == Order::kBackward ? n - 1 - i : i ^ twist;
    Thread& t = block.threads[32 * warp + lane];
    if (t.state == State::kDone || !wake(t)) continue;
    moved = block.started = true;
    run_thread(t);
    if (options.async == Async::kRandom && !work_.empty() && one_in(8)) {
      finish(random() % work_.size(), false);
    }
  }
  return moved;
}

void Machine::run_cluster() {
  const std::size_t warps = blocks_[0].met.size(), all = warps * blocks_.size();
  std::vector<std::size_t> turn(all);
  for (std::size_t i = 0; i < all; ++i) {
    turn[i] = options.order == Order::kBackward ? all - 1 - i : i;
  }
  const auto run_turn = [&](std::size_t i) { return run_warp(blocks_[i / warps], i % warps); };
  const std::size_t starved = options.order == Order::kStarved ? random() % all : all;
  cluster_phase_ = cluster_arrived_ = 0;
  cluster_left_ = static_cast<int>(blocks_.size() * blocks_[0].threads.size());
  while (cluster_left_ > 0) {
    if (options.order == Order::kShuffled) {
      for (std::size_t i = all; i > 1; --i) std::swap(turn[i - 1], turn[random() % i]);
    }
    bool moved = false;
    for (const std::size_t i : turn) {
      // As far as it goes, ahead of all others; shuffled, only to its next meeting.
      while (i != starved && run_turn(i)) {
        moved = true;
        if (options.order == Order::kShuffled) break;
      }
    }
    if (!moved && starved < all) moved = run_turn(starved);
    if (moved) continue;
    current_ = nullptr;
    if (work_.empty()) deadlock();
    finish(random() % work_.size(), false);
  }
}

void Machine::deadlock() const {
  static const char* const kStates[] = {"ready",
                                        "for its warp",
                                        "at a barrier of the block",
                                        "at an mbarrier",
                                        "at the cluster's barrier",
                                        "ended"};
  std::map<std::string, int> where;
  for (const Block& block : blocks_) {
    for (const Thread& t : block.threads) {
      if (t.state == State::kDone) continue;
      const Source& at = kernel_->sources[static_cast<std::size_t>(t.pc - 1)];
      ++where["block " + std::to_string(block.id[0]) + " warp " + std::to_string(t.index / 32) +
              " wait " + kStates[static_cast<int>(t.state)] + ", line " + std::to_string(at.line) +
              " of " + kernel_->name + ": " + at.text];
    }
  }
  std::string text = "deadlock: no thread can go on, and nothing is under way";
  int shown = 0;
  for (const auto& [place, count] : where) {
    if (++shown <= 12) text += "\n  " + std::to_string(count) + " threads of " + place;
  }
  fail(text);
}

void Machine::synchronise(const std::vector<Thread*>& threads, bool only_reads) {
  if (!options.races) return;
  Clock all;
  for (const Thread* t : threads) all.join(t->clock);
  for (Thread* t : threads) {
    only_reads ? t->clock.join_reads(all) : t->clock.join(all);
    t->clock.tick(t->index);
  }
}

void Machine::arrive_at_barrier(Thread& t, std::size_t id, int count) {
  Block::Barrier& barrier = t.block->barriers.at(id);
  if (barrier.arrived > 0 && barrier.expected != count) {
    fail("a barrier that others expect " + std::to_string(barrier.expected) + " threads at");
  }
  barrier.expected = count;
  ++barrier.arrived;
  t.barrier = static_cast<int>(id);
  t.state = State::kBlockBarrier;
  release_barrier(*t.block, id);
}
void Machine::release_barrier(Block& block, std::size_t id) {
  Block::Barrier& barrier = block.barriers[id];
  const int expected = barrier.expected != 0 ? barrier.expected : block.left;
  if (barrier.arrived == 0 || barrier.arrived < expected) return;
  std::vector<Thread*> waiting;
  for (Thread& t : block.threads) {
    if (t.state != State::kBlockBarrier || t.barrier != static_cast<int>(id)) continue;
    t.state = State::kReady;
    waiting.push_back(&t);
  }
  synchronise(waiting);
  barrier.arrived = 0;
}

void Machine::arrive_at_cluster(Thread& t, bool releases) {
  if (releases) {
    // This thread's arrivals elsewhere come before it.
    for (std::size_t i = work_.size(); i-- > 0;) {
      if (work_[i].kind == Work::kArrive && work_[i].thread == &t) finish(i, true);
    }
    t.block->cluster_arriving.join(release(t));
  }
  ++t.cluster_arrivals, ++cluster_arrived_;
  end_cluster_phase();
}
void Machine::end_cluster_phase() {
  if (cluster_arrived_ == 0 || cluster_arrived_ < cluster_left_) return;
  ++cluster_phase_;
  cluster_arrived_ = 0;
  for (Block& block : blocks_) block.cluster_arrived = block.cluster_arriving;
}

void Machine::end_thread(Thread& t) {
  if (!t.copies.empty()) fail("a thread ended with cp.async under way");
  if (t.unread_stores > 0) fail("a thread ended before its bulk stores had read their bytes");
  fence_proxy(t);
  t.state = State::kDone;
  Block& block = *t.block;
  --cluster_left_, --block.left;
  // A thread that has arrived and not waited is counted.
  if (t.cluster_arrivals > cluster_phase_) --cluster_arrived_;
  end_cluster_phase();
  if (block.left == 0) {
    for (const Work& work : work_) {
      const bool harmless = work.kind == Work::kStore && work.was_read;
      if (work.block == &block && !harmless) {
        fail("the block ended with work on its shared memory under way: " + work.text);
      }
    }
  }
  for (std::size_t id = 0; id < block.barriers.size(); ++id) {
    if (block.barriers[id].expected == 0) release_barrier(block, id);
  }
}

}  // namespace ptx
