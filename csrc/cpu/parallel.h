// Threads for the CPU kernels, on the OpenMP runtime that torch uses.
#pragma once

#include <pthread.h>

#include <atomic>
#include <cstdint>

namespace cfpo::cpu {

// After fork() the OpenMP runtime waits for ever for worker threads that only the parent has,
// whoever used them there: these kernels or torch. So a forked child works on one thread.
class ForkGuard {
 public:
  // Called when the module is loaded.
  static void install() {
    pthread_atfork(nullptr, nullptr, [] { forked() = true; });
  }
  static int allowed(int threads) { return threads <= 1 || forked() ? 1 : threads; }

 private:
  static bool& forked() {
    static bool value = false;
    return value;
  }
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
