// The Python module cfpo_kernels._C: numbers in, raw pointers through, exceptions out.
//
// Torch-free on purpose: one build serves every torch version. cfpo_kernels/backends/cpu.py and
// cuda.py are the only callers, and have checked every argument before they hand over an address.
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "kernel_bindings.h"

#if defined(CFPO_WITH_CUDA)
#include "cuda/bindings.h"
#include "cuda/device_query.h"
#endif

namespace cfpo::bindings {
namespace {

// The objective on its own, for the golden table that all languages share.
std::tuple<double, double> objective_term(const std::string& name,
                                          const std::vector<double>& parameters, double log_ratio,
                                          double advantage) {
  Token<double> token{};
  token.log_ratio = log_ratio;
  token.advantage = advantage;
  token.policy_weight = token.weight = 1.0;
  TokenLoss<double> loss{};
  with_policy(name, parameters, [&](const auto& policy) {
    loss = token_loss(policy, Regularizers{KlEstimator::kK3, 0.0, 0.0}, token);
  });
  return {loss.loss, loss.dlogp};
}

std::tuple<double, double> kl_estimate(const std::string& name, double logp, double ref_logp) {
  const Term<double> term = kl_term(kl_estimator(name), ref_logp - logp);
  return {term.loss, term.dlogp};
}

struct CpuKernels {
  static cpu::Execution execution(int threads, const std::string& level) {
    return {threads, level};
  }
  template <class... Arguments>
  static void policy_loss(const Arguments&... arguments) {
    cpu::policy_loss(arguments...);
  }
  static constexpr auto token_logps = cpu::token_logps;
  static constexpr auto token_logps_backward = cpu::token_logps_backward;
  static constexpr auto multiply_rows = cpu::multiply_rows;
};

#if defined(CFPO_WITH_CUDA)
py::dict cuda_query() {
  const cuda::DeviceQuery query = cuda::query_devices();
  py::list devices;
  for (const cuda::DeviceInfo& device : query.devices) {
    devices.append(py::dict(
        py::arg("name") = device.name, py::arg("capability_major") = device.capability_major,
        py::arg("capability_minor") = device.capability_minor,
        py::arg("total_memory") = device.total_memory, py::arg("sm_count") = device.sm_count));
  }
  return py::dict(py::arg("status") = query.status, py::arg("status_name") = query.status_name,
                  py::arg("status_text") = query.status_text,
                  py::arg("runtime_version") = query.runtime_version,
                  py::arg("driver_version") = query.driver_version, py::arg("devices") = devices);
}
#endif

}  // namespace
}  // namespace cfpo::bindings

PYBIND11_MODULE(_C, m) {
  namespace py = pybind11;
  cfpo::cpu::ForkGuard::install();
  m.def("cpu_levels", &cfpo::cpu::supported_levels);
  m.def("objective_term", &cfpo::bindings::objective_term);
  m.def("kl_term", &cfpo::bindings::kl_estimate);
  cfpo::bindings::bind_kernels<cfpo::bindings::CpuKernels, int, std::string>(m, py::arg("threads"),
                                                                             py::arg("level"));
#if defined(CFPO_WITH_CUDA)
  m.attr("cuda_built") = true;
  m.def("cuda_query", &cfpo::bindings::cuda_query);
  py::module_ cuda = m.def_submodule("cuda", "The CUDA kernels; cfpo_kernels/backends/cuda.py.");
  cfpo::bindings::bind_cuda_kernels(cuda);
#else
  m.attr("cuda_built") = false;
#endif
  m.attr("build_id") = CFPO_BUILD_ID;
  m.attr("cuda_archs") = CFPO_CUDA_ARCHS;
  m.attr("cuda_reason") = CFPO_CUDA_REASON;
}
