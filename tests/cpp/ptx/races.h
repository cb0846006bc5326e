// Data races between a block's ordinary accesses to shared memory, by vector clocks.
//
// A thread's clock says how much of every other thread's past it has been told of: by barriers of
// the block, the warp or the cluster, or by an mbarrier. An access has to know of all earlier ones
// that it conflicts with. Memory is looked at by words of 4 bytes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace ptx {

// Of reads a thread may know more than of writes: a value that came by a shuffle was read before,
// but what its thread wrote may come later.
class Clock {
 public:
  void begin(std::size_t threads, std::size_t own) {
    writes_.assign(threads, 0);
    writes_[own] = 1;
    reads_ = writes_;
  }
  void join(const Clock& other) {
    join(writes_, other.writes_);
    join(reads_, other.reads_);
  }
  void join_reads(const Clock& other) { join(reads_, other.reads_); }
  // What the thread does from now on is not known to who has joined its clock before.
  void tick(int own) {
    ++writes_[static_cast<std::size_t>(own)];
    ++reads_[static_cast<std::size_t>(own)];
  }

 private:
  friend class RaceDetector;
  using Times = std::vector<std::uint32_t>;
  static void join(Times& times, const Times& others) {
    times.resize(std::max(times.size(), others.size()));
    for (std::size_t i = 0; i < others.size(); ++i) times[i] = std::max(times[i], others[i]);
  }
  Times writes_, reads_;
};

class RaceDetector {
 public:
  void reset(std::size_t bytes) { words_.assign((bytes + 3) / 4, Word()); }

  // Bytes that come by another way: ordering these is not ordinary accesses' matter.
  void forget(std::size_t offset, std::size_t bytes) {
    for (std::size_t i = offset / 4; i < (offset + bytes + 3) / 4; ++i) words_[i] = Word();
  }

  // The thread that this access races with, or -1.
  int access(int thread, const Clock& clock, std::size_t offset, std::size_t bytes, bool write) {
    int other = -1;
    const Access own(thread, clock.writes_[static_cast<std::size_t>(thread)]);
    const auto read_is_known = [&](const Access& a) { return told(clock.reads_, a); };
    for (std::size_t i = offset / 4; i <= (offset + bytes - 1) / 4; ++i) {
      Word& word = words_[i];
      if (!told(clock.writes_, word.writer)) other = word.writer.first;
      auto& readers = word.readers;
      // Who is told of this access is told of the reads before it.
      readers.erase(std::remove_if(readers.begin(), readers.end(), read_is_known), readers.end());
      if (write) {
        if (!readers.empty()) other = readers[0].first;
        readers.clear();
        word.writer = own;
      } else {
        readers.push_back(own);
      }
    }
    return other;
  }

 private:
  using Access = std::pair<int, std::uint32_t>;  // thread, its time
  struct Word {
    Access writer{-1, 0};
    std::vector<Access> readers;
  };
  static bool told(const Clock::Times& times, const Access& access) {
    return access.first < 0 || times[static_cast<std::size_t>(access.first)] >= access.second;
  }
  std::vector<Word> words_;
};

}  // namespace ptx
