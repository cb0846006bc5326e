// Launching kernels and asking devices; on the GPU, or emulated for tests (CFPO_EMULATE).
#pragma once

#include <cstdint>

#include "cuda/kernels.h"
#include "cuda/plan.h"

namespace cfpo::cuda {

struct Grid {
  std::int64_t blocks = 0;
  int blocks_y = 1;
  int cluster = 0;  // blocks, consecutive ones of x, that run together; 0: no clusters
  int threads = 0;
  int shared_bytes = 0;
};

DeviceLimits device_limits(int device);

}  // namespace cfpo::cuda

#if defined(CFPO_EMULATE)
#include "emulation/launch.h"
#elif defined(__CUDACC__)
#include "cuda/launch_cuda.h"
#endif
