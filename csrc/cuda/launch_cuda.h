// Launches by the CUDA runtime.
#pragma once

#include <cuda_runtime.h>

#include <utility>

namespace cfpo::cuda {

// Makes `device` current and, once, gives the kernel its shared memory; throws if either fails.
void prepare_launch(const char* name, const void* kernel, int device);
// Throws unless the launch succeeded.
void check_launch(const char* name, int device, cudaError_t status);

// How many clusters of such a grid the device runs at once; 0 where it is shared or cut up so that
// it has not enough SMs side by side.
std::int64_t clusters_at_once(const char* name, const void* kernel, const Grid& grid, int device);

template <class... Parameters>
std::int64_t clusters_at_once(const char* name, void (*kernel)(Parameters...), const Grid& grid,
                              const Execution& execution) {
  return clusters_at_once(name, reinterpret_cast<const void*>(kernel), grid, execution.device);
}

inline cudaLaunchConfig_t launch_config(const Grid& grid, cudaLaunchAttribute& cluster) {
  cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(grid.cluster);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.attrs = &cluster;
  // Also for clusters of one block, so that messages and cluster barriers are those of a cluster;
  // older devices know none.
  config.numAttrs = grid.cluster > 0 ? 1 : 0;
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks), static_cast<unsigned>(grid.blocks_y));
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = static_cast<std::size_t>(grid.shared_bytes);
  return config;
}

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const Grid& grid,
            const Execution& execution, const Arguments&... arguments) {
  prepare_launch(name, reinterpret_cast<const void*>(kernel), execution.device);
  cudaLaunchAttribute cluster;
  cudaLaunchConfig_t config = launch_config(grid, cluster);
  config.stream = reinterpret_cast<cudaStream_t>(execution.stream);
  check_launch(name, execution.device, cudaLaunchKernelEx(&config, kernel, arguments...));
}

}  // namespace cfpo::cuda
