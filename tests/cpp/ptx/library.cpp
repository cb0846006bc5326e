// The interpreter for Python: parse a module, launch a kernel of it, ask what it knows.
#include "ptx/machine.h"

namespace {

std::string message;  // of the last error, or of the last answer

// What the function returns, or `failed` with a message.
template <class Result, class Function>
Result guarded(Result failed, Function function) {
  try {
    return function();
  } catch (const std::exception& error) {
    message = error.what();
    return failed;
  }
}

}  // namespace

extern "C" {

struct PtxLaunch {
  unsigned grid[3], block[3], cluster;
  unsigned long long shared;
  const char* params;
  unsigned long long param_bytes;
  int async, order;
  unsigned long long seed;
  int exact_if_exact, proxies, races, unwritten_is_error, n_ranges;
  const ptx::Range* ranges;
};

const char* ptx_message() { return message.c_str(); }

void* ptx_load(const char* text) {
  return guarded<void*>(nullptr, [&] { return new ptx::Kernels(ptx::parse(text)); });
}
void ptx_free(void* module) { delete static_cast<ptx::Kernels*>(module); }

// Lines "kernel<tab>form<tab>count" of a module; of none, all forms that there are.
const char* ptx_forms(const void* module) {
  message.clear();
  if (module == nullptr) {
    for (const std::string& form : ptx::all_forms()) message += form + "\n";
    return message.c_str();
  }
  for (const auto& [name, kernel] : *static_cast<const ptx::Kernels*>(module)) {
    for (const auto& [form, count] : kernel.forms) {
      message += name + "\t" + form + "\t" + std::to_string(count) + "\n";
    }
  }
  return message.c_str();
}

// The number of instructions executed, or -1.
long long ptx_launch(const void* module, const char* name, const PtxLaunch* how) {
  return guarded(-1ll, [&] {
    const auto& kernels = *static_cast<const ptx::Kernels*>(module);
    const auto found = kernels.find(name);
    if (found == kernels.end()) throw ptx::Error(std::string("no kernel ") + name);
    ptx::Launch launch;
    std::copy_n(how->grid, 3, launch.grid.begin());
    std::copy_n(how->block, 3, launch.block.begin());
    launch.cluster = how->cluster;
    launch.shared = how->shared;
    launch.params.assign(how->params, how->params + how->param_bytes);
    ptx::Machine machine;
    machine.options = {static_cast<ptx::Async>(how->async),
                       static_cast<ptx::Order>(how->order),
                       how->seed,
                       0,
                       how->exact_if_exact != 0,
                       how->proxies,
                       how->races != 0,
                       how->unwritten_is_error != 0};
    machine.ranges.assign(how->ranges, how->ranges + how->n_ranges);
    machine.run(found->second, launch);
    return static_cast<long long>(machine.instructions());
  });
}
}
