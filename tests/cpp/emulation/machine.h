// A CPU that runs CUDA kernels: one fibre for each thread, so that barriers and shuffles are places
// where fibres wait for each other. Kernels reach it only through primitives.h.
//
// It is stricter than a GPU where that finds mistakes. An asynchronous copy spoils its target and
// delivers only when it is waited for; shared memory begins as NaN and has exact bounds; a warp
// whose lanes meet at different places, a thread that leaves with copies under way, a misaligned
// access are errors. Threads run in an order that the test chooses, so that a missing barrier shows
// in one order or another. What it cannot show: races within one barrier interval that happen to
// give the right value, the GPU's memory model, timing.
//
// Blocks run one cluster after another; the blocks of a cluster run together. schedule.h runs
// them; async.h adds what they share: barriers, bulk copies, each other's memory.
#pragma once

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulation {

constexpr int kWarp = 32;
constexpr std::size_t kStackBytes = 256 * 1024;

// kStarved: one warp, which changes, moves only when no other can.
enum class Order { kForward, kBackward, kShuffled, kStarved };
// kPoll: until `ready` is true, whatever the others do.
enum class Meeting { kNone, kWarpSync, kShuffle, kBlockSync, kPoll };

struct Copy {
  void* to;
  const void* from;
};

struct BulkCopy {
  void* to;
  const void* from;  // null: what was seen
  std::size_t bytes;
  std::vector<char> seen;  // a store or a message: what was there when it started
};

// An mbarrier: a phase ends when all have arrived and all expected bytes have come.
struct Barrier {
  int count = 0;
  int pending = 0;
  std::size_t expected = 0;
  unsigned phase = 0;
  std::vector<BulkCopy> copies;
};

struct Block;

// A stack that is not running. Where there is nothing better ucontext switches, at the price of two
// system calls.
#if defined(__x86_64__)
struct Context {
  void* top = nullptr;
};
extern "C" void emulation_switch(void** from, void* to);
asm(R"(
  .text
  .weak emulation_switch
  .type emulation_switch, @function
emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size emulation_switch, .-emulation_switch
)");
inline void switch_context(Context& from, Context& to) { emulation_switch(&from.top, to.top); }
inline void begin_context(Context& context, char* stack, void (*entry)()) {
  auto end = reinterpret_cast<std::uintptr_t>(stack + kStackBytes) & ~std::uintptr_t{15};
  void** top = reinterpret_cast<void**>(end) - 2;  // as after a call: 8 bytes off alignment
  top[0] = reinterpret_cast<void*>(entry);
  top[1] = nullptr;
  context.top = top - 6;
}
#else
using Context = ucontext_t;
inline void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }
inline void begin_context(Context& context, char* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
#endif

struct Thread {
  Context context;
  std::unique_ptr<char[]> stack;
  void* sanitizer_stack = nullptr;
  Block* block = nullptr;
  int index = 0;
  Meeting waits_at = Meeting::kNone;
  bool done = false;
  int exchanges = 0;
  std::vector<Copy> open_copies;
  std::deque<std::vector<Copy>> groups;
  std::function<bool()> ready;
  int cluster_arrivals = 0;
  int syncs = 0;  // sync_threads
  // Vectors of shared memory since the last fence_async, which the asynchronous proxy does not know
  // of.
  std::vector<std::size_t> written, read;
  std::vector<BulkCopy> open_bulk_stores;
  std::deque<std::vector<BulkCopy>> bulk_stores;
};

struct Block {
  long index = 0;
  int index_y = 0;
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::unique_ptr<char, Free> shared;  // of exact size, for the address sanitizer
  std::size_t shared_bytes = 0;
  std::vector<Thread> threads;
  std::vector<std::uint64_t> exchange[2];  // what a lane shows to its warp, by turns
  bool started = false;
  int left = 0;                       // threads that have not ended
  std::vector<int> writers, readers;  // of each vector of shared memory, who have not fenced it
  std::map<const void*, Barrier> barriers;
};

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulation: %s\n", what);
  std::fflush(stderr);
  std::abort();
}

struct Machine {
  Order order = Order::kForward;
  long block_count = 0;
  int block_count_y = 0;
  Context scheduler;
  Thread* current = nullptr;
  std::function<void()> body;
  std::mt19937 random{1};
  std::vector<Block> cluster;  // kept from launch to launch for their stacks
  int cluster_size = 0;        // 0: not launched as clusters
};

inline Machine& machine() {
  static Machine m;
  return m;
}

inline Thread& current() { return *machine().current; }

inline void switch_to_scheduler(Thread& thread) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(thread.done ? nullptr : &thread.sanitizer_stack, nullptr, 0);
#endif
  switch_context(thread.context, machine().scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(thread.sanitizer_stack, nullptr, nullptr);
#endif
}

inline void switch_to_thread(Thread& thread) {
  machine().current = &thread;
#if defined(__SANITIZE_ADDRESS__)
  void* own = nullptr;
  __sanitizer_start_switch_fiber(&own, thread.stack.get(), kStackBytes);
#endif
  switch_context(machine().scheduler, thread.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(own, nullptr, nullptr);
#endif
}

inline void run_thread() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  machine().body();
  Thread& thread = current();
  if (!thread.open_copies.empty() || !thread.groups.empty() || !thread.open_bulk_stores.empty() ||
      !thread.bulk_stores.empty()) {
    fail("a thread ended with asynchronous copies under way");
  }
  thread.done = true;
  switch_to_scheduler(thread);
}

inline void wait_at(Meeting meeting) {
  current().waits_at = meeting;
  switch_to_scheduler(current());
}

inline void prepare(Thread& thread, Block& block, int index) {
  thread.block = &block;
  thread.index = index;
  thread.waits_at = Meeting::kNone;
  thread.done = false;
  thread.exchanges = 0;
  thread.cluster_arrivals = thread.syncs = 0;
  thread.written.clear();
  thread.read.clear();
  if (!thread.stack) thread.stack.reset(new char[kStackBytes]);  // only what is used gets memory
  begin_context(thread.context, thread.stack.get(), run_thread);
}

// Shows `x` to the warp; what lane `from` of it shows.
template <class T>
T exchange(T x, int from) {
  static_assert(sizeof(T) <= 8);
  Thread& thread = current();
  std::vector<std::uint64_t>& slots = thread.block->exchange[thread.exchanges++ % 2];
  std::memcpy(&slots[thread.index], &x, sizeof x);
  wait_at(Meeting::kShuffle);
  std::memcpy(&x, &slots[thread.index / kWarp * kWarp + from], sizeof x);
  return x;
}

inline void check_aligned(const void* p) {
  if (reinterpret_cast<std::uintptr_t>(p) % 16 != 0) fail("a misaligned 16-byte access");
}
// Offset of `bytes` bytes within the block's shared memory.
inline std::size_t shared_offset(const void* p, std::size_t bytes) {
  const Block& block = *current().block;
  const char* address = static_cast<const char*>(p);
  const char* begin = block.shared.get();
  if (address < begin || address + bytes > begin + block.shared_bytes) {
    fail("an access outside the block's shared memory");
  }
  return static_cast<std::size_t>(address - begin);
}
inline void check_shared(const void* p) {
  check_aligned(p);
  shared_offset(p, 16);
}

inline void copy_async(void* to, const void* from) {
  check_shared(to);
  check_aligned(from);
  std::memset(to, 0xFF, 16);
  current().open_copies.push_back({to, from});
}
inline void commit_copies() {
  Thread& thread = current();
  thread.groups.push_back(std::move(thread.open_copies));
  thread.open_copies.clear();
}
inline void wait_copies(int pending) {
  if (pending < 0) fail("waits for more copies than are under way");
  Thread& thread = current();
  while (static_cast<int>(thread.groups.size()) > pending) {
    for (const Copy& copy : thread.groups.front()) std::memcpy(copy.to, copy.from, 16);
    thread.groups.pop_front();
  }
}

}  // namespace emulation
