// The Python module that runs the CUDA kernels emulated: the same functions as
// cfpo_kernels._C.cuda, on addresses of CPU memory.
#include <pybind11/functional.h>

#include "cuda/bindings.h"
#include "cuda/launch.h"

PYBIND11_MODULE(emulated_cuda, m) {
  cfpo::bindings::bind_cuda_kernels(m);
  m.def(
      "set_device",
      [](int sm_count, int shared_per_block, int shared_per_sm, bool clusters) {
        emulation::limits() = {sm_count, shared_per_block, shared_per_sm, clusters};
      },
      pybind11::arg("sm_count"), pybind11::arg("shared_per_block"), pybind11::arg("shared_per_sm"),
      pybind11::arg("clusters") = false);
  // From here on the kernels' C++ runs, or their PTX: `loader` gives the text of the module that
  // has a kernel, by its mangled name.
  m.def("use_source", [] { emulation::use_ptx(nullptr); });
  m.def("use_ptx", [](emulation::PtxLoader loader) { emulation::use_ptx(std::move(loader)); });
  m.def("set_largest_cluster", [](int blocks) { emulation::largest_cluster() = blocks; });
  const auto plan_clusters = [](int n_segments, std::int64_t n_rows, const std::string& row_kernel,
                                bool capped) {
    const cfpo::cuda::ClusterPlan plan = cfpo::cuda::plan_clusters(n_segments, emulation::limits());
    pybind11::dict values;
    values["cluster"] = plan.cluster;
    values["chosen"] = cfpo::cuda::use_clusters(n_rows, plan, emulation::limits(),
                                                cfpo::cuda::row_kernel(row_kernel), capped);
    if (plan.cluster == 0) return values;
    pybind11::list firsts;
    for (int rank = 0; rank <= plan.cluster; ++rank) firsts.append(plan.first_segment(rank));
    values["first_segments"] = firsts;
    values["slice"] = plan.slice_segments();
    values["slots"] = plan.slots;
    values["warps"] = plan.warps;
    values["slot_bytes"] = plan.shared.slot_bytes;
    for (const auto& [name, offset] :
         {std::pair("sums", plan.shared.sums), std::pair("barriers", plan.shared.barriers),
          std::pair("notes", plan.shared.notes), std::pair("gradients", plan.shared.gradients),
          std::pair("shared_bytes", plan.shared.bytes)}) {
      values[name] = offset;
    }
    return values;
  };
  m.def("plan_clusters", plan_clusters, pybind11::arg("n_segments"), pybind11::arg("n_rows"),
        pybind11::arg("row_kernel"), pybind11::arg("capped") = false);
  m.def("plan_transient",
        [](int n_segments, bool entropy, std::int64_t n_rows, const std::string& row_kernel) {
          const cfpo::cuda::TransientPlan plan =
              cfpo::cuda::plan_transient(n_segments, entropy, emulation::limits());
          pybind11::dict values;
          values["cluster"] = plan.cluster;
          values["chosen"] = cfpo::cuda::use_transient(n_rows, plan, emulation::limits(),
                                                       cfpo::cuda::row_kernel(row_kernel));
          if (plan.cluster == 0) return values;
          values["slice"] = plan.slice_segments();
          values["blocks_per_sm"] = plan.blocks_per_sm;
          values["warps"] = plan.warps;
          values["sums"] = plan.sums;
          values["gradient"] = plan.gradient;
          values["barriers"] = plan.barriers;
          values["shared_bytes"] = plan.bytes;
          return values;
        });
  m.def("last_kernel", [] { return emulation::last_kernel(); });
  m.def("plan_rows", [](int n_segments, bool both_sweeps) {
    const cfpo::cuda::RowPlan plan =
        cfpo::cuda::plan_rows(n_segments, both_sweeps, emulation::limits());
    return pybind11::dict(pybind11::arg("warps_per_row") = plan.warps_per_row(),
                          pybind11::arg("threads") = plan.warps() * 32,
                          pybind11::arg("warp_windows") = plan.windows,
                          pybind11::arg("windows") = plan.windows_before(plan.warps()),
                          pybind11::arg("blocks_per_sm") = plan.blocks_per_sm,
                          pybind11::arg("shared_bytes") = cfpo::cuda::RowSharedMemory(plan).bytes);
  });
  m.def("set_order", [](const std::string& name) {
    using emulation::Order;
    emulation::machine().order = name == "forward"    ? Order::kForward
                                 : name == "backward" ? Order::kBackward
                                 : name == "starved"  ? Order::kStarved
                                                      : Order::kShuffled;
  });
}
