// csrc/cuda/launch.h on a CPU: a device of any size, and launches that return when they are done.
// What runs is the kernel's C++, or its PTX: see ptx/launch.h.
#pragma once

#include <stdexcept>
#include <string>

#include "emulation/schedule.h"
#include "ptx/launch.h"

namespace emulation {

// What the kernels are told about the device; an H100 unless a test says otherwise.
inline cfpo::cuda::DeviceLimits& limits() {
  static cfpo::cuda::DeviceLimits value{132, 227 * 1024, 228 * 1024};
  return value;
}

// The largest cluster that finds SMs side by side.
inline int& largest_cluster() {
  static int value = 8;
  return value;
}

// The kernel that was launched last.
inline std::string& last_kernel() {
  static std::string name;
  return name;
}

}  // namespace emulation

namespace cfpo::cuda {

inline DeviceLimits device_limits(int) { return emulation::limits(); }

template <class... Parameters>
std::int64_t clusters_at_once(const char*, void (*)(Parameters...), const Grid& grid,
                              const Execution&) {
  if (grid.cluster > emulation::largest_cluster()) return 0;
  return std::max(1, emulation::limits().sm_count / grid.cluster);
}

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const Grid& grid, const Execution&,
            const Arguments&... arguments) {
  if (grid.shared_bytes > emulation::limits().shared_per_block || grid.threads > 1024) {
    throw std::runtime_error(std::string("launching ") + name + " failed: too large a block");
  }
  emulation::last_kernel() = name;
  if (emulation::run_ptx() != nullptr) {
    emulation::Ranges ranges;
    (ranges.add(static_cast<const Parameters&>(arguments)), ...);
    emulation::run_ptx()(
        reinterpret_cast<const void*>(kernel), grid,
        {{&static_cast<const Parameters&>(arguments), sizeof(Parameters), alignof(Parameters)}...},
        ranges);
    return;
  }
  emulation::run_grid(grid.blocks, grid.blocks_y, grid.cluster, grid.threads,
                      static_cast<std::size_t>(grid.shared_bytes), [&] { kernel(arguments...); });
}

}  // namespace cfpo::cuda
