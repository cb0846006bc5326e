#include <map>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <tuple>

#include "cuda/launch.h"

namespace cfpo::cuda {

namespace {

constexpr char kQuery[] = "a query";

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
  const std::string text = "cfpo_kernels: " + what + " on " + describe(device) +
                           " failed: " + cudaGetErrorName(status) + ": " +
                           cudaGetErrorString(status);
  // The runtime keeps the last error, also one of describe()'s: a later, unrelated check would
  // report it.
  cudaGetLastError();
  throw std::runtime_error(text);
}

void choose_device(const std::string& why, int device) {
  check("choosing the device for " + why, device, cudaSetDevice(device));
}

// What is done once may load code. While this thread captures a graph that is forbidden, although
// it is no part of the graph, unless the thread says that it knows what it does.
class OutsideCapture {
 public:
  OutsideCapture(const std::string& why, int device) {
    check("relaxing the capture of graphs for " + why, device,
          cudaThreadExchangeStreamCaptureMode(&mode_));
  }
  OutsideCapture(const OutsideCapture&) = delete;
  ~OutsideCapture() {
    if (cudaThreadExchangeStreamCaptureMode(&mode_) != cudaSuccess) cudaGetLastError();
  }

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;  // later the thread's own
};

int attribute(const std::string& why, cudaDeviceAttr name, int device) {
  int value = 0;
  check("reading the attributes for " + why, device, cudaDeviceGetAttribute(&value, name, device));
  return value;
}

// Code for compute capability 8.0 runs on later devices too, and knows no clusters.
__global__ void probe_kernel() {}
bool built_for_clusters(int device) {
  choose_device(kQuery, device);
  cudaFuncAttributes attributes;
  const auto probe = reinterpret_cast<const void*>(probe_kernel);
  check("asking for a kernel's attributes", device, cudaFuncGetAttributes(&attributes, probe));
  return attributes.ptxVersion >= 90;
}

// A device where no such cluster fits, such as a slice of a GPU, may answer with an error, not with
// 0.
bool too_large(cudaError_t status) {
  return status == cudaErrorInvalidClusterSize || status == cudaErrorInvalidConfiguration ||
         status == cudaErrorLaunchOutOfResources;
}

}  // namespace

DeviceLimits device_limits(int device) {
  static std::mutex mutex;
  static std::map<int, DeviceLimits> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  const OutsideCapture outside(kQuery, device);
  DeviceLimits limits;
  limits.sm_count = attribute(kQuery, cudaDevAttrMultiProcessorCount, device);
  limits.shared_per_block = attribute(kQuery, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  limits.shared_per_sm = attribute(kQuery, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  limits.clusters =
      attribute(kQuery, cudaDevAttrClusterLaunch, device) != 0 && built_for_clusters(device);
  return known[device] = limits;
}

void prepare_launch(const char* name, const void* kernel, int device) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> ready;
  const std::lock_guard<std::mutex> lock(mutex);
  if (ready.count({kernel, device}) != 0) return choose_device(name, device);
  const OutsideCapture outside(name, device);
  choose_device(name, device);
  // The kernels may have all the shared memory there is, and need no L1; what a block gets is what
  // its launch asks for.
  const int most = attribute(name, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
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
  const OutsideCapture outside(name, device);
  int count = 0;
  cudaError_t status = cudaSuccess;
  if (grid.cluster > kPortableCluster) {
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (status == cudaErrorInvalidValue || status == cudaErrorNotSupported) {
      status = cudaErrorInvalidClusterSize;  // on a device that has no larger ones
    }
  }
  if (status == cudaSuccess) status = cudaOccupancyMaxActiveClusters(&count, kernel, &config);
  if (too_large(status)) {
    cudaGetLastError();
    count = 0;
  } else {
    check(std::string("counting clusters for ") + name, device, status);
  }
  return known[key] = count;
}

void check_launch(const char* name, int device, cudaError_t status) {
  check(std::string("launching ") + name, device, status);
}

}  // namespace cfpo::cuda
