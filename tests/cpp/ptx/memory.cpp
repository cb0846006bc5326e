// Memory, and everything that is checked about an access to it.
#include <algorithm>

#include "ptx/machine.h"

namespace ptx {
namespace {

// Ordinary accesses that copies of the other proxy do not know of until the thread has fenced.
void note_unfenced(Thread& t, std::size_t offset, std::size_t bytes, bool write) {
  if (t.machine->proxies() < (write ? 1 : 2)) return;
  Block& block = *t.block;
  for (std::size_t v = offset / 16; v <= (offset + bytes - 1) / 16; ++v) {
    ++(write ? block.unfenced_writes : block.unfenced_reads)[v];
    (write ? t.unfenced_writes : t.unfenced_reads).push_back(v);
  }
}

// Whether it is of shared memory, and then the address in it.
bool in_shared(Space space, std::uint64_t& address) {
  if (space == Space::kGeneric && (address & kGenericShared) != 0) {
    address &= ~kGenericShared;
    return true;
  }
  return space == Space::kShared;
}
void check_aligned(const Thread& t, std::uint64_t address, std::size_t bytes) {
  if (address % bytes == 0) return;
  t.machine->fail("a misaligned access of " + std::to_string(bytes) + " bytes");
}

}  // namespace

std::size_t shared_offset(const Thread& t, const Block& block, std::uint64_t address,
                          std::size_t bytes, std::size_t align) {
  if (address % align != 0) {
    t.machine->fail("a misaligned access of " + std::to_string(bytes) + " bytes");
  }
  const std::uint64_t offset = address - kSharedBase;  // what is below becomes very large
  if (offset >= block.shared.size() || bytes > block.shared.size() - offset) {
    t.machine->fail("an access of " + std::to_string(bytes) + " bytes outside the " +
                    std::to_string(block.shared.size()) + " of shared memory, at " +
                    std::to_string(static_cast<std::int64_t>(offset)));
  }
  return offset;
}

char* global_memory(const Thread& t, std::uint64_t address, std::size_t bytes, bool write) {
  char* p = reinterpret_cast<char*>(address);
  const auto holds = [&](const Range& range) {
    return p >= range.begin && p + bytes <= range.end && (!write || range.write);
  };
  const std::vector<Range>& ranges = t.machine->ranges;
  const bool inside = ranges.empty() || std::any_of(ranges.begin(), ranges.end(), holds);
  // The other address spaces are that low.
  if (address < (std::uint64_t{1} << 28) || !inside) {
    t.machine->fail(write ? "a write outside the memory that the kernel was given"
                          : "a read outside the memory that the kernel was given");
  }
  return p;
}

const char* read(Thread& t, Space space, std::uint64_t address, std::size_t bytes) {
  if (in_shared(space, address)) {
    const std::size_t offset = shared_offset(t, *t.block, address, bytes, bytes);
    note_unfenced(t, offset, bytes, false);
    check_content(t, *t.block, offset, bytes);
    check_race(t, offset, bytes, false);
    return t.block->shared.data() + offset;
  }
  check_aligned(t, address, bytes);
  if (space != Space::kParam) return global_memory(t, address, bytes, false);
  const std::vector<char>& params = t.machine->launch().params;
  const std::uint64_t offset = address - kParamBase;
  if (offset + bytes > params.size()) t.machine->fail("a read outside the parameters");
  return params.data() + offset;
}

void write(Thread& t, Space space, std::uint64_t address, const char* data, std::size_t bytes) {
  if (!in_shared(space, address)) {
    check_aligned(t, address, bytes);
    std::copy_n(data, bytes, global_memory(t, address, bytes, true));
    return;
  }
  Block& block = *t.block;
  const std::size_t offset = shared_offset(t, block, address, bytes, bytes);
  note_unfenced(t, offset, bytes, true);
  // Several threads may write what is there: all lanes that the last row was the last, say.
  const auto at = block.shared.begin() + static_cast<std::ptrdiff_t>(offset);
  if (!std::equal(data, data + bytes, at)) check_race(t, offset, bytes, true);
  land(block, offset, data, bytes);
}

void begin_write(Block& block, std::size_t offset, std::size_t bytes) {
  const auto at = static_cast<std::ptrdiff_t>(offset);
  std::fill_n(block.shared.begin() + at, bytes, static_cast<char>(0xFF));
  std::fill_n(block.content.begin() + at, bytes, Content::kUnderWay);
}
void land(Block& block, std::size_t offset, const char* from, std::size_t bytes) {
  const auto at = static_cast<std::ptrdiff_t>(offset);
  std::copy_n(from, bytes, block.shared.begin() + at);
  std::fill_n(block.content.begin() + at, bytes, Content::kWritten);
}

void check_content(const Thread& t, const Block& block, std::size_t offset, std::size_t bytes) {
  const auto begin = block.content.begin() + static_cast<std::ptrdiff_t>(offset);
  const auto end = begin + static_cast<std::ptrdiff_t>(bytes);
  if (std::find(begin, end, Content::kUnderWay) != end) {
    t.machine->fail("a read of shared memory that is on its way, at " + std::to_string(offset));
  }
  if (t.machine->options.unwritten_is_error && std::find(begin, end, Content::kNothing) != end) {
    t.machine->fail("a read of shared memory that nobody wrote, at " + std::to_string(offset));
  }
}

void check_race(const Thread& t, std::size_t offset, std::size_t bytes, bool write) {
  if (!t.machine->options.races) return;
  const int other = t.block->races.access(t.index, t.clock, offset, bytes, write);
  if (other >= 0) {
    t.machine->fail("a race with thread " + std::to_string(other) + " for shared memory at " +
                    std::to_string(offset));
  }
}

void fence_proxy(Thread& t) {
  for (const std::size_t v : t.unfenced_reads) --t.block->unfenced_reads[v];
  for (const std::size_t v : t.unfenced_writes) --t.block->unfenced_writes[v];
  t.unfenced_reads.clear();
  t.unfenced_writes.clear();
}

}  // namespace ptx
