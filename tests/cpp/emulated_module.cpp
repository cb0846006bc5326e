// The Python module that runs the CUDA kernels emulated: the same functions as
// cfpo_kernels._C.cuda, on addresses of CPU memory.
#include "cuda/bindings.h"
#include "cuda/launch.h"

PYBIND11_MODULE(emulated_cuda, m) {
  cfpo::bindings::bind_cuda_kernels(m);
  m.def("set_device", [](int sm_count, int shared_per_block, int shared_per_sm) {
    emulation::limits() = {sm_count, shared_per_block, shared_per_sm};
  });
  m.def("plan_rows", [](int n_segments, bool both_sweeps) {
    const cfpo::cuda::RowPlan plan =
        cfpo::cuda::plan_rows(n_segments, both_sweeps, emulation::limits());
    return pybind11::dict(pybind11::arg("warps_per_row") = plan.warps_per_row(),
                          pybind11::arg("threads") = plan.warps() * 32,
                          pybind11::arg("slots") = plan.slots,
                          pybind11::arg("windows") = plan.windows_before(plan.warps()),
                          pybind11::arg("blocks_per_sm") = plan.blocks_per_sm,
                          pybind11::arg("shared_bytes") = cfpo::cuda::RowSharedMemory(plan).bytes);
  });
  m.def("set_order", [](const std::string& name) {
    emulation::machine().order = name == "forward"    ? emulation::Order::kForward
                                 : name == "backward" ? emulation::Order::kBackward
                                                      : emulation::Order::kShuffled;
  });
}
