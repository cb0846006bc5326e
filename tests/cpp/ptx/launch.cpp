// What runs a kernel's PTX where emulation/launch.h launches it.
//
// A program runs the PTX in the folder that $CFPO_PTX names. $CFPO_PTX_SEED is the seed,
// $CFPO_PTX_ASYNC an Async, $CFPO_PTX_RACES=1 looks for data races.
#include "ptx/launch.h"

#include <dlfcn.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "cuda/launch.h"
#include "ptx/machine.h"

namespace emulation {
namespace {

// Never destroyed: it may belong to a Python that has ended by then.
PtxLoader& loader() {
  static auto* function = new PtxLoader;
  return *function;
}
ptx::Kernels& kernels() {
  static ptx::Kernels all;
  return all;
}

// Its module may have other kernels for devices that these do not run on.
const ptx::Kernel& find_kernel(const std::string& name) {
  auto found = kernels().find(name);
  if (found != kernels().end()) return found->second;
  ptx::Kernels module = ptx::parse(loader()(name));
  found = module.find(name);
  if (found == module.end()) throw ptx::Error("ptx: no kernel " + name);
  return kernels().emplace(name, std::move(found->second)).first->second;
}

int option(const char* name, int otherwise) {
  const char* value = std::getenv(name);
  return value == nullptr ? otherwise : std::atoi(value);
}

// Late where a thread runs as far as it goes before others, at once where they go backwards.
ptx::Options options() {
  static std::uint64_t launches = 0;
  ptx::Options chosen;
  chosen.order = static_cast<ptx::Order>(machine().order);
  const auto async = machine().order == Order::kForward    ? ptx::Async::kLate
                     : machine().order == Order::kBackward ? ptx::Async::kImmediate
                                                           : ptx::Async::kRandom;
  chosen.async = static_cast<ptx::Async>(option("CFPO_PTX_ASYNC", static_cast<int>(async)));
  // One for all launches: a row has to have the same bits from every kernel, and it decides about
  // the errors of approximations too.
  chosen.seed = static_cast<std::uint64_t>(option("CFPO_PTX_SEED", 1));
  chosen.schedule = launches++;
  chosen.races = option("CFPO_PTX_RACES", 0) != 0;
  return chosen;
}

void run(const void* function, const cfpo::cuda::Grid& grid,
         const std::vector<Parameter>& parameters, const Ranges& ranges) {
  Dl_info info;
  if (dladdr(function, &info) == 0 || info.dli_sname == nullptr) {
    throw ptx::Error("ptx: a kernel without a name");
  }
  const ptx::Kernel& kernel = find_kernel(info.dli_sname);
  ptx::Launch launch;
  launch.grid = {static_cast<unsigned>(grid.blocks), static_cast<unsigned>(grid.blocks_y), 1};
  launch.block[0] = static_cast<unsigned>(grid.threads);
  launch.cluster = static_cast<unsigned>(grid.cluster);
  launch.shared = static_cast<std::size_t>(grid.shared_bytes);
  launch.params.assign(kernel.param_bytes, '\xA5');  // also what pads them
  bool alike = kernel.params.size() == parameters.size();
  for (std::size_t i = 0; i < parameters.size() && alike; ++i) {
    const ptx::Param& p = kernel.params[i];
    alike = p.bytes == parameters[i].bytes && p.align == parameters[i].align;
    if (alike) std::memcpy(launch.params.data() + p.offset, parameters[i].value, p.bytes);
  }
  if (!alike) throw ptx::Error("ptx: parameters that differ from the C++'s: " + kernel.name);
  static ptx::Machine machine;
  machine.options = options();
  machine.ranges.clear();
  for (const auto& [begin, end, write] : ranges.list()) {
    machine.ranges.push_back({begin, end, write});
  }
  machine.run(kernel, launch);
}

std::string read_folder(const char* folder, const std::string& kernel) {
  for (const auto& file : std::filesystem::directory_iterator(folder)) {
    std::stringstream text;
    text << std::ifstream(file.path()).rdbuf();
    if (text.str().find(".entry " + kernel + "(") != std::string::npos) return text.str();
  }
  throw ptx::Error("ptx: no file has " + kernel);
}

const bool chosen_by_environment = [] {
  const char* folder = std::getenv("CFPO_PTX");
  if (folder == nullptr) return false;
  use_ptx([folder](const std::string& kernel) { return read_folder(folder, kernel); });
  return true;
}();

}  // namespace

void use_ptx(PtxLoader chosen) {
  run_ptx() = chosen ? run : nullptr;
  loader() = std::move(chosen);
  kernels().clear();
}

}  // namespace emulation
