// A CPU that runs PTX: threads with registers, warps that meet, blocks with shared memory and
// barriers, clusters, and copies that arrive when a seed says so.
//
// Threads are independent of each other, as from compute capability 7.0 on: each runs until it has
// to wait, and the order is the test's. Registers and shared memory begin as NaNs. What is
// asynchronous is done at once, at random and in pieces, or as late as possible: when it is waited
// for, or nobody can go on. It is stricter than a GPU where that finds mistakes: accesses are
// checked for bounds, alignment, bytes that nobody wrote, missing proxy fences and data races.
#pragma once

#include <memory>

#include "ptx/program.h"
#include "ptx/races.h"

namespace ptx {

enum class Async { kImmediate, kLate, kRandom };
// kStarved: one warp, which changes, moves only when no other can.
enum class Order { kForward, kBackward, kShuffled, kStarved };
enum class Space { kGeneric, kGlobal, kShared, kParam };
// Of a byte of shared memory.
enum class Content : char { kNothing, kWritten, kUnderWay };

struct Options {
  Async async = Async::kRandom;
  Order order = Order::kShuffled;
  std::uint64_t seed = 1;       // of the approximations' errors
  std::uint64_t schedule = 0;   // with `seed`, of everything else
  bool exact_if_exact = false;  // approximations of what float32 has have no error
  // In kernels with bulk copies. 1: a bulk store of bytes whose writer has not fenced them is an
  // error; 2: so is what writes asynchronously over bytes whose reader has not fenced them.
  int proxies = 2;
  bool races = false;
  // Whether a read of shared memory that nobody has written is an error. Where not, it gives NaNs:
  // kernels read whole vectors and structs of which they use a part. Nobody may read, at all, what
  // is under way.
  bool unwritten_is_error = false;
};

struct Launch {
  std::array<unsigned, 3> grid{1, 1, 1};
  std::array<unsigned, 3> block{1, 1, 1};
  unsigned cluster = 0;  // blocks of x; 0: launched without
  std::size_t shared = 0;
  std::vector<char> params;
};

// Memory that a kernel may touch. Without any, it may touch everything.
struct Range {
  const char *begin, *end;
  bool write;
};

enum class State { kReady, kMeetsWarp, kBlockBarrier, kMbarrier, kClusterBarrier, kDone };

struct Block;
class Machine;

struct Thread {
  std::uint64_t* registers = nullptr;
  const std::uint64_t* constants = nullptr;
  Block* block = nullptr;
  Machine* machine = nullptr;
  int index = 0;
  int pc = 0;
  State state = State::kReady;
  int barrier = 0;  // of the block, where it waits
  struct Poll {
    std::size_t mbarrier = 0;
    unsigned parity = 0;
    Operand result = 0;
    int early = 0;  // answers that said no although it could have waited
  } poll;
  int cluster_arrivals = 0, cluster_waits = 0;
  struct Copy {
    std::size_t to;  // offset in shared memory, of 16 bytes
    const char* from;
    int group;
  };
  std::vector<Copy> copies;            // cp.async under way
  int copy_group = 0, bulk_group = 0;  // those that are open
  int unread_stores = 0;
  std::vector<std::size_t> unfenced_reads, unfenced_writes;  // vectors of shared memory
  Clock clock;
};

struct Mbarrier {
  int count = 0, pending = 0;
  std::int64_t bytes = 0;
  unsigned phase = 0;
  std::uint64_t mark = 0;  // what its 8 bytes hold
  Clock arriving, arrived;
};

struct Block {
  std::array<unsigned, 3> id{};
  unsigned rank = 0;
  std::vector<char> shared;
  std::vector<Content> content;                      // of each byte of it
  std::vector<int> unfenced_reads, unfenced_writes;  // of each vector: threads
  RaceDetector races;
  std::vector<std::uint64_t> registers;
  std::vector<Thread> threads;
  std::vector<std::uint32_t> met;  // of each warp: lanes that wait for others
  struct Barrier {
    int arrived = 0, expected = 0;  // expected 0: all that have not ended
  };
  std::array<Barrier, 16> barriers{};
  std::map<std::size_t, Mbarrier> mbarriers;  // by offset
  Clock cluster_arriving, cluster_arrived;
  int left = 0;
  bool started = false;
};

// A bulk copy, st.async or remote arrival on its way.
struct Work {
  enum Kind { kLoad, kStore, kSend, kArrive } kind = kLoad;
  Block* block = nullptr;  // whose shared memory it touches
  std::size_t shared = 0;  // offset there
  std::size_t bytes = 0;
  std::size_t mbarrier = 0;  // offset; not of a store
  char* to = nullptr;        // of a store
  const char* from = nullptr;
  std::vector<char> data;
  Thread* thread = nullptr;
  // Who waits for the mbarrier is told of what the thread, if of that block, did before: taken to
  // be so for messages and copies too, whose completion is a release.
  Clock clock;
  int group = 0;
  bool was_read = false;            // of a store: its source
  std::vector<std::size_t> pieces;  // of a load: 16 bytes each, still to come
  std::string text;
};

class Machine {
 public:
  Options options;
  std::vector<Range> ranges;

  void run(const Kernel& kernel, const Launch& launch);
  std::uint64_t instructions() const { return instructions_; }

  // For the instructions.
  [[noreturn]] void fail(const std::string& what) const;
  std::uint64_t random();
  bool one_in(unsigned n) { return random() % n == 0; }
  const Launch& launch() const { return launch_; }
  const Kernel& kernel() const { return *kernel_; }
  const std::string& text_of(const Thread& t) const;
  int proxies() const { return kernel_->has_async_proxy ? options.proxies : 0; }
  // Takes the block out of a shared::cluster address; a plain one is the thread's own.
  Block& take_peer(const Thread& t, std::uint64_t& address);
  std::uint32_t map_peer(std::uint32_t address, std::uint32_t rank) const;
  void start(Work work);
  void finish(std::size_t index, bool wholly);
  std::vector<Work>& work() { return work_; }
  Mbarrier& mbarrier(Block& block, std::size_t offset) const;
  void init_mbarrier(Block& block, std::size_t offset, int count);
  void arrive(Block& block, std::size_t offset, std::int64_t expected_bytes, const Clock& clock);
  void complete_bytes(Block& block, std::size_t offset, std::int64_t bytes, const Clock& clock);
  // A thread's clock for others to join; what it does afterwards is later.
  Clock release(Thread& t) const;
  void arrive_at_barrier(Thread& t, std::size_t id, int count);
  void arrive_at_cluster(Thread& t, bool releases);
  void end_thread(Thread& t);
  // What one of the threads has seen, all know from here on; or only what they have read.
  void synchronise(const std::vector<Thread*>& threads, bool only_reads = false);

 private:
  void begin_block(Block& block, std::array<unsigned, 3> id, unsigned rank);
  std::uint64_t special(const std::string& name, const Block& block, unsigned thread) const;
  void run_cluster();
  bool run_warp(Block& block, std::size_t warp);
  void run_thread(Thread& t);
  bool wake(Thread& t);
  void release_barrier(Block& block, std::size_t id);
  void end_cluster_phase();
  void end_phase(Mbarrier& barrier);
  bool advance(Work& work, bool wholly);
  [[noreturn]] void deadlock() const;

  const Kernel* kernel_ = nullptr;
  Launch launch_;
  std::vector<Block> blocks_;  // of the cluster that runs
  std::vector<Work> work_;
  const Thread* current_ = nullptr;         // whose instruction is executed, and
  const std::string* finishing_ = nullptr;  // whose work is finished, for messages
  std::uint64_t random_ = 1, instructions_ = 0;
  // Threads that have ended count as having arrived at the cluster's barrier.
  int cluster_phase_ = 0, cluster_arrived_ = 0, cluster_left_ = 0;
};

inline std::uint64_t raw(const Thread& t, Operand operand) {
  return operand >= 0 ? t.registers[operand] : t.constants[~operand];
}

// An address of shared memory as an offset; checked for bounds and alignment.
std::size_t shared_offset(const Thread& t, const Block& block, std::uint64_t address,
                          std::size_t bytes, std::size_t align);
char* global_memory(const Thread& t, std::uint64_t address, std::size_t bytes, bool write);
// Ordinary accesses, aligned to their size.
const char* read(Thread& t, Space space, std::uint64_t address, std::size_t bytes);
void write(Thread& t, Space space, std::uint64_t address, const char* data, std::size_t bytes);
// Until bytes arrive that are under way, what was there is gone.
void begin_write(Block& block, std::size_t offset, std::size_t bytes);
void land(Block& block, std::size_t offset, const char* from, std::size_t bytes);
void check_content(const Thread& t, const Block& block, std::size_t offset, std::size_t bytes);
void check_race(const Thread& t, std::size_t offset, std::size_t bytes, bool write);
void fence_proxy(Thread& t);

}  // namespace ptx
