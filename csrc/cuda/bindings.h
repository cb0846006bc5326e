// The CUDA kernels as Python functions of a module; shared by _C and the emulation in the tests.
#pragma once

#include "cuda/kernels.h"
#include "kernel_bindings.h"

namespace cfpo::bindings {

struct CudaKernels {
  static cuda::Execution execution(int device, std::uintptr_t stream, Address workspace,
                                   const std::string& row_kernel) {
    return {device, stream, pointer<void>(workspace), cuda::row_kernel(row_kernel)};
  }
  static constexpr auto policy_loss = cuda::policy_loss;
  static constexpr auto token_logps = cuda::token_logps;
  static constexpr auto token_logps_backward = cuda::token_logps_backward;
  static constexpr auto multiply_rows = cuda::multiply_rows;
};

inline void bind_cuda_kernels(py::module_& m) {
  bind_kernels<CudaKernels, int, std::uintptr_t, Address, std::string>(
      m, py::arg("device"), py::arg("stream"), py::arg("workspace"), py::arg("row_kernel"));
  m.def("workspace_bytes", [](const RowsTuple& logits, int device) {
    return cuda::workspace_bytes(make_rows(logits), device);
  });
}

}  // namespace cfpo::bindings
