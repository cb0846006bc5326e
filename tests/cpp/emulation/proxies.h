// Shared memory, as the two proxies see it.
//
// Threads read and write it by the generic proxy, bulk copies and messages by the asynchronous one.
// The latter may read what a thread has written, and overwrite what a thread has read or written,
// only once that thread has called fence_async. Until then the access counts for each vector of 16
// bytes that it touched, and a copy that meets it is an error.
//
// So every access has to come through here. Built with the address sanitizer, what the asynchronous
// proxy has written is poisoned for everybody else.
#pragma once

#include <string>
#include <vector>

#include "emulation/machine.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace emulation {

#if defined(__SANITIZE_ADDRESS__)
inline void close_to_others(const void* p, std::size_t bytes) {
  __asan_poison_memory_region(p, bytes);
}
// Lets the functions here touch whole vectors, and closes again what was closed: of a vector that
// is half beyond the memory, or beside a closed one, only that part.
class Opened {
 public:
  Opened(const void* p, std::size_t bytes) {
    const auto address = reinterpret_cast<std::uintptr_t>(p);
    begin_ = reinterpret_cast<char*>(address / 16 * 16);
    bytes_ = (address % 16 + bytes + 15) / 16 * 16;
    for (std::size_t at = 0; at < bytes_; at += kGranule) {
      if (__asan_address_is_poisoned(begin_ + at) != 0) closed_.push_back(at);
    }
    if (!closed_.empty()) __asan_unpoison_memory_region(begin_, bytes_);
  }
  Opened(const Opened&) = delete;
  ~Opened() {
    for (const std::size_t at : closed_) close_to_others(begin_ + at, kGranule);
  }

 private:
  static constexpr std::size_t kGranule = 8;  // of the address sanitizer

  char* begin_;
  std::size_t bytes_;
  std::vector<std::size_t> closed_;
};
#else
inline void close_to_others(const void*, std::size_t) {}
struct Opened {
  Opened(const void*, std::size_t) {}
  ~Opened() {}
};
#endif

// An access by a thread: to be fenced by it.
inline void note_access(std::vector<std::size_t>& own, std::vector<int>& all, std::size_t offset,
                        std::size_t bytes) {
  for (std::size_t i = offset / 16; i <= (offset + bytes - 1) / 16; ++i) {
    own.push_back(i);
    ++all[i];
  }
}
inline void read_shared(void* to, const void* p, std::size_t bytes) {
  Thread& thread = current();
  note_access(thread.read, thread.block->readers, shared_offset(p, bytes), bytes);
  const Opened opened(p, bytes);
  std::memcpy(to, p, bytes);
}
inline void store_shared(void* p, const void* vector) {
  check_shared(p);
  Thread& thread = current();
  note_access(thread.written, thread.block->writers, shared_offset(p, 16), 16);
  const Opened opened(p, 16);
  std::memcpy(p, vector, 16);
}
inline void fence_async() {
  Thread& thread = current();
  for (const std::size_t i : thread.written) --thread.block->writers[i];
  for (const std::size_t i : thread.read) --thread.block->readers[i];
  thread.written.clear();
  thread.read.clear();
}

// `bytes` bytes from `offset`, which a copy is about to read, or to overwrite.
inline void check_written(const Block& block, std::size_t offset, std::size_t bytes) {
  for (std::size_t i = offset / 16; i < (offset + bytes) / 16; ++i) {
    if (block.writers[i] != 0) fail("a bulk store of bytes that are not fenced");
  }
}
inline void check_left(const Block& block, std::size_t offset, std::size_t bytes,
                       const std::string& what) {
  for (std::size_t i = offset / 16; i < (offset + bytes) / 16; ++i) {
    if (block.readers[i] != 0)
      fail((what + " over bytes whose reader has not fenced them").c_str());
    if (block.writers[i] != 0)
      fail((what + " over bytes whose writer has not fenced them").c_str());
  }
}

// What the asynchronous proxy writes: first nonsense, then, when it is waited for, the bytes.
inline void spoil(void* to, std::size_t bytes) {
  const Opened opened(to, bytes);
  std::memset(to, 0xFF, bytes);
  close_to_others(to, bytes);
}
inline void land(const BulkCopy& copy) {
  const Opened opened(copy.to, copy.bytes);
  std::memcpy(copy.to, copy.from != nullptr ? copy.from : copy.seen.data(), copy.bytes);
}
// What it reads.
inline std::vector<char> seen(const void* from, std::size_t bytes) {
  const Opened opened(from, bytes);
  const char* begin = static_cast<const char*>(from);
  return {begin, begin + bytes};
}

}  // namespace emulation
