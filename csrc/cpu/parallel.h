// Threads for the CPU kernels, on the OpenMP runtime that torch uses.
#pragma once

#include <omp.h>
#include <pthread.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstring>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace cfpo::cpu {

// After fork() the OpenMP runtime waits for ever for worker threads that only the parent has,
// whoever used them there: these kernels or torch. So a forked child works on one thread.
class ForkGuard {
 public:
  // Called when the module is loaded.
  static void install() {
    forked() = forked_before();
    pthread_atfork(nullptr, nullptr, [] { forked() = true; });
  }
  static int allowed(int threads) { return threads <= 1 || forked() ? 1 : threads; }

 private:
  static bool& forked() {
    static bool value = false;
    return value;
  }
  // Whether this process was forked before the module was loaded and has run no other program
  // since: then torch may have used its threads in the parent.
  static bool forked_before() {
    bool answer = false;
#if defined(__linux__)
    constexpr unsigned kForkedNoExec = 0x40;  // PF_FORKNOEXEC of the kernel's sched.h
    std::FILE* file = std::fopen("/proc/self/stat", "r");
    if (file == nullptr) return answer;
    // pid (name) state ppid pgrp session tty_nr tpgid flags; the name may hold anything.
    char text[256];
    text[std::fread(text, 1, sizeof text - 1, file)] = '\0';
    std::fclose(file);
    const char* name_end = std::strrchr(text, ')');
    unsigned flags = 0;
    if (name_end != nullptr) {
      answer = std::sscanf(name_end, ") %*c %*d %*d %*d %*d %*d %u", &flags) == 1 &&
               (flags & kForkedNoExec) != 0;
    }
#endif
    return answer;
  }
};

// The default floating-point mode for as long as it lives, on the thread that made it: to nearest,
// subnormals are numbers. The modes of OpenMP's threads are those of whoever started them, and
// torch.set_flush_denormal or a library built with -ffast-math changes only the caller's.
class DefaultFloatMode {
 public:
  DefaultFloatMode() : before_(get()) { set(kDefault); }
  ~DefaultFloatMode() { set(before_); }
  DefaultFloatMode(const DefaultFloatMode&) = delete;
  DefaultFloatMode& operator=(const DefaultFloatMode&) = delete;

 private:
#if defined(__SSE__)
  using Mode = unsigned;
  static constexpr Mode kDefault = 0x1F80;  // of MXCSR: all exceptions masked
  static Mode get() { return _mm_getcsr(); }
  static void set(Mode mode) { _mm_setcsr(mode); }
#elif defined(__aarch64__)
  using Mode = std::uint64_t;
  static constexpr Mode kDefault = 0;  // of FPCR
  static Mode get() {
    Mode mode;
    asm volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
  }
  static void set(Mode mode) { asm volatile("msr fpcr, %0" : : "r"(mode) : "memory"); }
#else
  using Mode = int;
  static constexpr Mode kDefault = 0;
  static Mode get() { return kDefault; }
  static void set(Mode) {}
#endif
  Mode before_;
};

// Hands out items 0..n-1: each thread of a team its own first one, the others one after another.
// Each thread also knows the item it will get next, so that it can fetch that one's memory early;
// were the first ones not its own, a thread that starts early would have two and a late one none.
class WorkQueue {
 public:
  explicit WorkQueue(std::int64_t n) : n_(n) {}

  // Called by every thread of the team. body(item, next), next = -1 when there is none.
  template <class Body>
  void drain(Body body) {
    const std::int64_t team = omp_get_num_threads();
    std::int64_t next = omp_get_thread_num();
    while (next < n_) {
      const std::int64_t item = next;
      next = team + taken_.fetch_add(1, std::memory_order_relaxed);
      body(item, next < n_ ? next : -1);
    }
  }

 private:
  std::int64_t n_;
  std::atomic<std::int64_t> taken_{0};
};

}  // namespace cfpo::cpu
