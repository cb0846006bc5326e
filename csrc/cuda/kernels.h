// The CUDA kernels' entry points. They only enqueue work: each returns before its outputs are
// written, allocates nothing, waits for nothing, and can be captured into a graph. A failure to
// launch is a std::runtime_error that names the kernel, the device and the cause.
//
// The calling thread's current device is `device` afterwards. Restoring it is left to the caller:
// torch has a CUDA runtime of its own, and only torch knows what it takes for current.
#pragma once

#include <cstdint>

#include "core/params.h"
#include "cuda/plan.h"

namespace cfpo::cuda {

struct Execution {
  int device;
  std::uintptr_t stream;  // a cudaStream_t
  void* workspace;        // of workspace_bytes(); may be null where that is 0
  RowKernel row_kernel = RowKernel::kAuto;
};

// Memory that policy_loss and token_logps want for such logits on that device.
std::int64_t workspace_bytes(const Rows& logits, int device);

void policy_loss(const PolicyLossParams& params, const Execution& execution);
void token_logps(const TokenLogpsParams& params, const Execution& execution);
void token_logps_backward(const TokenLogpsBackwardParams& params, const Execution& execution);

// rows[i, :] *= factors[i * factor_stride]; rows with factor 1 are not touched.
void multiply_rows(const Rows& rows, const float* factors, std::int64_t factor_stride,
                   const Execution& execution);

}  // namespace cfpo::cuda
