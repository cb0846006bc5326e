// Threads for the CPU kernels, on the OpenMP runtime that torch uses.
#pragma once

#include <pthread.h>

#include <atomic>
#include <cstdint>

namespace cfpo::cpu {

// After fork() the OpenMP runtime waits for worker threads that the child does not have. A child
// of a process that has used them therefore runs on its one thread.
class ForkGuard {
 public:
  static int allowed(int threads) {
    static const bool registered = [] { return pthread_atfork(nullptr, nullptr, on_fork) == 0; }();
    (void)registered;
    if (threads <= 1 || orphaned()) return 1;
    team_exists() = true;
    return threads;
  }

 private:
  static bool& team_exists() {
    static bool value = false;
    return value;
  }
  static bool& orphaned() {
    static bool value = false;
    return value;
  }
  static void on_fork() { orphaned() = orphaned() || team_exists(); }
};

// Hands out items 0..n-1 one after another. Each thread also knows the item it will get next, so
// that it can fetch that one's memory early.
class WorkQueue {
 public:
  explicit WorkQueue(std::int64_t n) : n_(n) {}

  // body(item, next), next = -1 when there is none
  template <class Body>
  void drain(Body body) {
    std::int64_t next = take();
    while (next >= 0) {
      const std::int64_t item = next;
      next = take();
      body(item, next);
    }
  }

 private:
  std::int64_t take() {
    const std::int64_t item = next_.fetch_add(1, std::memory_order_relaxed);
    return item < n_ ? item : -1;
  }
  std::int64_t n_;
  std::atomic<std::int64_t> next_{0};
};

}  // namespace cfpo::cpu
