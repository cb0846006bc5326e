#include <cuda_runtime.h>

#include "cuda/device_query.h"

namespace cfpo::cuda {
namespace {

cudaError_t read_device(int index, DeviceInfo& info) {
  cudaDeviceProp properties;
  const cudaError_t status = cudaGetDeviceProperties(&properties, index);
  if (status != cudaSuccess) return status;
  info.name = properties.name;
  info.capability_major = properties.major;
  info.capability_minor = properties.minor;
  info.total_memory = static_cast<std::int64_t>(properties.totalGlobalMem);
  info.sm_count = properties.multiProcessorCount;
  return cudaSuccess;
}

cudaError_t read_all(DeviceQuery& query) {
  cudaError_t status = cudaRuntimeGetVersion(&query.runtime_version);
  if (status != cudaSuccess) return status;
  status = cudaDriverGetVersion(&query.driver_version);
  if (status != cudaSuccess) return status;
  int count = 0;
  status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) return status;
  query.devices.resize(count);
  for (int index = 0; index < count; ++index) {
    status = read_device(index, query.devices[index]);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

std::string version(int number) {
  return "CUDA " + std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

// The runtime calls the driver too old also where there is none.
std::string about_old_driver(const DeviceQuery& query) {
  const int major = query.runtime_version / 1000;
  const std::string runtime = version(query.runtime_version);
  const std::string needs = runtime + ", which this build has, needs " +
                            (major == 13   ? "driver 580 or newer"
                             : major == 12 ? "driver 525 or newer"
                                           : "a newer one");
  if (query.driver_version == 0) return "there is no NVIDIA driver; " + needs;
  return "the driver is for " + version(query.driver_version) + "; " + needs;
}

}  // namespace

DeviceQuery query_devices() {
  DeviceQuery query;
  const cudaError_t status = read_all(query);
  if (status != cudaSuccess) {
    query.devices.clear();
    // The runtime keeps the last error: a later, unrelated launch check would report this one.
    cudaGetLastError();
  }
  query.status = status;
  query.status_name = cudaGetErrorName(status);
  query.status_text =
      status == cudaErrorInsufficientDriver ? about_old_driver(query) : cudaGetErrorString(status);
  return query;
}

}  // namespace cfpo::cuda
