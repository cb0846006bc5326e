#include <map>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <tuple>

#include "cuda/launch.h"

namespace cfpo::cuda {

namespace {

std::string describe(int device) {
  cudaDeviceProp properties;
  std::string text = "device " + std::to_string(device);
  if (cudaGetDeviceProperties(&properties, device) == cudaSuccess) {
    text += " (" + std::string(properties.name) + ")";
  }
  return text;
}

void check(const std::string& what, int device, cudaError_t status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or a later, unrelated check would report it
  throw std::runtime_error("cfpo_kernels: " + what + " on " + describe(device) + " failed: " +
                           cudaGetErrorName(status) + ": " + cudaGetErrorString(status));
}

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check("reading the attributes", device, cudaDeviceGetAttribute(&value, name, device));
  return value;
}

// Code for compute capability 8.0 runs on later devices too, and knows no clusters.
__global__ void probe_kernel() {}
bool built_for_clusters(int device) {
  check("choosing the device for a query", device, cudaSetDevice(device));
  cudaFuncAttributes attributes;
  const auto probe = reinterpret_cast<const void*>(probe_kernel);
  check("asking for a kernel's attributes", device, cudaFuncGetAttributes(&attributes, probe));
  return attributes.ptxVersion >= 90;
}

}  // namespace

DeviceLimits device_limits(int device) {
  static std::mutex mutex;
  static std::map<int, DeviceLimits> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  DeviceLimits limits;
  limits.sm_count = attribute(cudaDevAttrMultiProcessorCount, device);
  limits.shared_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  limits.shared_per_sm = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  limits.clusters = attribute(cudaDevAttrClusterLaunch, device) != 0 && built_for_clusters(device);
  return known[device] = limits;
}

void prepare_launch(const char* name, const void* kernel, int device) {
  check(std::string("choosing the device for ") + name, device, cudaSetDevice(device));
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> ready;
  const std::lock_guard<std::mutex> lock(mutex);
  if (ready.count({kernel, device}) != 0) return;
  // The kernels may have all the shared memory there is, and need no L1; what a block gets is what
  // its launch asks for.
  const int most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  const std::string what = std::string("reserving shared memory for ") + name;
  check(what, device,
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
  check(what, device,
        cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                             cudaSharedmemCarveoutMaxShared));
  ready.insert({kernel, device});
}

std::int64_t clusters_at_once(const char* name, const void* kernel, const Grid& grid, int device) {
  prepare_launch(name, kernel, device);
  static std::mutex mutex;
  static std::map<std::tuple<const void*, int, int, int, int>, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_tuple(kernel, device, grid.cluster, grid.threads, grid.shared_bytes);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  Grid one = grid;
  one.blocks = grid.cluster;
  cudaLaunchAttribute cluster;
  const cudaLaunchConfig_t config = launch_config(one, cluster);
  int count = 0;
  check(std::string("counting clusters for ") + name, device,
        cudaOccupancyMaxActiveClusters(&count, kernel, &config));
  return known[key] = count;
}

void check_launch(const char* name, int device, cudaError_t status) {
  check(std::string("launching ") + name, device, status);
}

}  // namespace cfpo::cuda
