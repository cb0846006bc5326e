// A CUDA runtime without CUDA: what csrc/cuda uses of it on the host, with the names and numbers of
// the real one. It runs nothing. Each call prints itself and returns success, or what a test has
// told it to return.
#pragma once

#include <cstddef>
#include <cstdio>
#include <deque>
#include <map>
#include <set>
#include <string>
#include <vector>

#define __global__

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorIllegalAddress = 700,
  cudaErrorLaunchOutOfResources = 701,
  cudaErrorNotSupported = 801,
  cudaErrorStreamCaptureUnsupported = 900,
  cudaErrorInvalidClusterSize = 912
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
  cudaDevAttrClusterLaunch = 120
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
  cudaFuncAttributeNonPortableClusterSizeAllowed = 14
};
enum cudaSharedCarveout { cudaSharedmemCarveoutMaxShared = 100 };
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal = 0, cudaStreamCaptureModeRelaxed = 2 };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct cudaDeviceProp {
  char name[256];
  std::size_t totalGlobalMem;
  int major, minor, multiProcessorCount;
};
struct cudaFuncAttributes {
  int ptxVersion;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
using cudaStream_t = struct Stream*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace fake {

struct Runtime {
  std::map<std::string, std::deque<cudaError_t>> script;  // what the next calls return
  cudaError_t last_error = cudaSuccess;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
  bool capturing = false;  // this thread, a graph
  std::set<int> begun;     // devices that have a context
  std::vector<const void*> kernels;
  std::map<int, int> attributes{{cudaDevAttrMultiProcessorCount, 132},
                                {cudaDevAttrMaxSharedMemoryPerMultiprocessor, 228 * 1024},
                                {cudaDevAttrMaxSharedMemoryPerBlockOptin, 227 * 1024},
                                {cudaDevAttrClusterLaunch, 1}};
  int ptx_version = 90, clusters = 16, runtime_version = 13000, driver_version = 13000;
};
inline Runtime& runtime() {
  static Runtime value;
  return value;
}

inline const std::map<cudaError_t, const char*>& errors() {
  static const std::map<cudaError_t, const char*> names{
      {cudaSuccess, "cudaSuccess"},
      {cudaErrorInvalidValue, "cudaErrorInvalidValue"},
      {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration"},
      {cudaErrorInsufficientDriver, "cudaErrorInsufficientDriver"},
      {cudaErrorNoDevice, "cudaErrorNoDevice"},
      {cudaErrorInvalidDevice, "cudaErrorInvalidDevice"},
      {cudaErrorNoKernelImageForDevice, "cudaErrorNoKernelImageForDevice"},
      {cudaErrorIllegalAddress, "cudaErrorIllegalAddress"},
      {cudaErrorLaunchOutOfResources, "cudaErrorLaunchOutOfResources"},
      {cudaErrorNotSupported, "cudaErrorNotSupported"},
      {cudaErrorStreamCaptureUnsupported, "cudaErrorStreamCaptureUnsupported"},
      {cudaErrorInvalidClusterSize, "cudaErrorInvalidClusterSize"}};
  return names;
}

// kernel 0, 1, ... in the order in which they are first seen.
inline std::string kernel(const void* function) {
  std::vector<const void*>& seen = runtime().kernels;
  std::size_t i = 0;
  while (i < seen.size() && seen[i] != function) ++i;
  if (i == seen.size()) seen.push_back(function);
  return "kernel " + std::to_string(i);
}

// `loads`: what may load code or make a context, and is refused while a graph is captured by a
// thread that has not relaxed its mode.
inline cudaError_t call(const std::string& name, const std::string& arguments, bool loads = false) {
  Runtime& r = runtime();
  cudaError_t status = cudaSuccess;
  if (!r.script[name].empty()) {
    status = r.script[name].front();
    r.script[name].pop_front();
  } else if (loads && r.capturing && r.mode != cudaStreamCaptureModeRelaxed) {
    status = cudaErrorStreamCaptureUnsupported;
  }
  std::printf("%s(%s)%s%s\n", name.c_str(), arguments.c_str(), status ? " = " : "",
              status ? errors().at(status) : "");
  if (status != cudaSuccess) r.last_error = status;
  return status;
}

inline std::string text(int value) { return std::to_string(value); }
inline std::string text(const dim3& d) { return text(d.x) + "x" + text(d.y) + "x" + text(d.z); }
inline std::string text(const cudaLaunchConfig_t& config) {
  std::string all = "grid " + text(config.gridDim) + ", block " + text(config.blockDim) + ", " +
                    std::to_string(config.dynamicSmemBytes) + " bytes, stream " +
                    std::to_string(reinterpret_cast<std::size_t>(config.stream));
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const auto& cluster = config.attrs[i].val.clusterDim;
    all += config.attrs[i].id == cudaLaunchAttributeClusterDimension ? ", cluster " : ", unknown ";
    all += text(dim3(cluster.x, cluster.y, cluster.z));
  }
  return all;
}

}  // namespace fake

inline const char* cudaGetErrorName(cudaError_t error) { return fake::errors().at(error); }
inline const char* cudaGetErrorString(cudaError_t) { return "what it means"; }
// Forgets the error, unless it has destroyed the context.
inline cudaError_t cudaGetLastError() {
  std::printf("cudaGetLastError()\n");
  cudaError_t& last = fake::runtime().last_error;
  const cudaError_t was = last;
  if (last != cudaErrorIllegalAddress) last = cudaSuccess;
  return was;
}

inline cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = fake::runtime().runtime_version;
  return fake::call("cudaRuntimeGetVersion", "");
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = fake::runtime().driver_version;
  return fake::call("cudaDriverGetVersion", "");
}
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return fake::call("cudaGetDeviceCount", "");
}
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  *properties = {"A Device", 1 << 30, 9, 0, 132};
  return fake::call("cudaGetDeviceProperties", fake::text(device));
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int device) {
  *value = fake::runtime().attributes.at(name);
  return fake::call("cudaDeviceGetAttribute", fake::text(name) + ", " + fake::text(device));
}
inline cudaError_t cudaSetDevice(int device) {
  const bool first = fake::runtime().begun.count(device) == 0;
  const cudaError_t status = fake::call("cudaSetDevice", fake::text(device), first);
  if (status == cudaSuccess) fake::runtime().begun.insert(device);
  return status;
}
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  const cudaError_t status = fake::call("cudaThreadExchangeStreamCaptureMode", fake::text(*mode));
  if (status == cudaSuccess) std::swap(*mode, fake::runtime().mode);
  return status;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->ptxVersion = fake::runtime().ptx_version;
  return fake::call("cudaFuncGetAttributes", "", true);
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute name, int value) {
  return fake::call("cudaFuncSetAttribute",
                    fake::kernel(kernel) + ", " + fake::text(name) + ", " + fake::text(value),
                    true);
}
inline cudaError_t cudaOccupancyMaxActiveClusters(int* count, const void* kernel,
                                                  const cudaLaunchConfig_t* config) {
  *count = fake::runtime().clusters;
  return fake::call("cudaOccupancyMaxActiveClusters",
                    fake::kernel(kernel) + ", " + fake::text(*config), true);
}
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&...) {
  return fake::call("cudaLaunchKernelEx", fake::kernel(reinterpret_cast<const void*>(kernel)) +
                                              ", " + fake::text(*config));
}
