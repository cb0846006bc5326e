// What the CUDA runtime sees on this machine. Needs no CUDA header, so that bindings.cpp stays
// plain C++.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace cfpo::cuda {

struct DeviceInfo {
  std::string name;
  int capability_major = 0;
  int capability_minor = 0;
  std::int64_t total_memory = 0;  // bytes
  int sm_count = 0;
};

struct DeviceQuery {
  int status = 0;                   // a cudaError_t; 0 is success
  std::string status_name;          // e.g. "cudaErrorInsufficientDriver"
  std::string status_text;          // a sentence for it
  int runtime_version = 0;          // 1000 * major + 10 * minor, e.g. 13000
  int driver_version = 0;           // newest runtime that the driver supports; 0 without a driver
  std::vector<DeviceInfo> devices;  // empty unless status is 0
};

// Never throws for want of a driver or a device: that is what `status` tells. Initialises the
// driver, so a process that forks afterwards cannot use CUDA in its children.
DeviceQuery query_devices();

}  // namespace cfpo::cuda
