// A module of PTX as the parser leaves it: what machine.h runs.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace ptx {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Where the address spaces begin: not at 0, so that an offset is not taken for an address.
constexpr std::uint64_t kSharedBase = 0x400;
constexpr std::uint64_t kParamBase = 0x10000;
// A shared::cluster address: (rank + 1) << kPeerShift | address in that block.
constexpr int kPeerShift = 24;
// What makes a shared address a generic one.
constexpr std::uint64_t kGenericShared = std::uint64_t{1} << 56;

struct Thread;
struct Instruction;
using Execute = void (*)(Thread&, const Instruction&);

// The number of a register, or ~number of a constant.
using Operand = int;
constexpr int kMostOperands = 10;

struct Instruction {
  Execute execute = nullptr;
  int variant = 0;     // what the table of forms says besides
  int target = -1;     // of a branch
  Operand guard = -1;  // the predicate of @p or @!p
  bool guard_is = true;
  int n_operands = 0;
  // The elements of a vector follow each other; an address is two operands, base and offset.
  std::array<Operand, kMostOperands> operands{};
};

// For messages.
struct Source {
  int line;
  std::string text;
};

struct Param {
  std::size_t offset, bytes, align;
};

struct Kernel {
  std::string name;
  std::vector<Param> params;
  std::size_t param_bytes = 0;
  int max_threads = 1024;
  int n_registers = 0;
  bool has_async_proxy = false;         // bulk copies
  std::map<std::string, int> specials;  // %tid.x and so on: registers that are set beforehand
  std::vector<std::uint64_t> constants;
  std::vector<Instruction> code;
  std::vector<Source> sources;       // of `code`
  std::map<std::string, int> forms;  // how often each occurs
};

using Kernels = std::map<std::string, Kernel>;

Kernels parse(const std::string& text);

// An opcode with its modifiers and the shape of its operands: one letter each, `r` for a register
// or a constant, `m` for an address, `p` for a register with a predicate behind a bar, a digit for
// a vector of that many.
struct Form {
  Execute execute;
  int variant = 0;
};
// Null where the table has no such form.
const Form* find_form(const std::string& form);
std::vector<std::string> all_forms();

}  // namespace ptx
