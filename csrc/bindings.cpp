// The Python module cfpo_kernels._C: numbers and tensors' addresses in, exceptions out.
//
// Torch-free on purpose: one build serves every torch version. cfpo_kernels/backends/native.py is
// the only caller of kernels, and hands over addresses after every argument was checked.
#include <cstdlib>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "kernel_bindings.h"

#if defined(CFPO_WITH_CUDA)
#include "cuda/bindings.h"
#include "cuda/device_query.h"
#endif

namespace cfpo::bindings {
namespace {

// The objective on its own, for the golden table that all languages share. Bounds that are not
// given are the objective's.
std::tuple<double, double> policy_term(const std::string& shape, const std::vector<double>& numbers,
                                       double logp, double log_ratio, double advantage,
                                       std::optional<double> low, std::optional<double> high,
                                       double token_weight) {
  const Policy policy = make_policy(shape, numbers);
  Token token{};
  token.logp = logp;
  token.log_ratio = log_ratio;
  token.advantage = advantage;
  token.token_weight = token_weight;
  token.weight = 1.0;
  token.low = low.value_or(policy.low(advantage));
  token.high = high.value_or(policy.high(advantage));
  const TokenLoss loss = token_loss(policy, {KlEstimator::kK3, false, 0.0, 0.0}, token);
  return {loss.loss, loss.dlogp};
}

std::tuple<double, double> kl_term(const std::string& name, double distance, double log_ratio,
                                   bool ratio_weighted) {
  const Term term =
      cfpo::kl_term({kl_estimator(name), ratio_weighted, 1.0, 0.0}, distance, log_ratio);
  return {term.loss, term.dlogp};
}

// The first row of weight other than 0 whose token is outside [0, n_cols); -1: none.
std::int64_t first_bad_token(Address token_ids, Address weights, std::int64_t n_rows,
                             std::int64_t n_cols) {
  const auto* ids = pointer<const std::int64_t>(token_ids);
  const auto* weight = pointer<const float>(weights);
  for (std::int64_t row = 0; row < n_rows; ++row) {
    if ((ids[row] < 0 || ids[row] >= n_cols) && weight[row] != 0.0f) return row;
  }
  return -1;
}

struct CpuKernels {
  // CFPO_KERNELS_CPU_LEVEL forces an instruction set: for tests and for comparing. Read here: a
  // variable that is not set costs Python an exception.
  static cpu::Execution execution(int threads) {
    const char* level = std::getenv("CFPO_KERNELS_CPU_LEVEL");
    return {threads, level == nullptr ? "" : level};
  }
  static constexpr auto policy_loss = cpu::policy_loss;
  static constexpr auto token_logps = cpu::token_logps;
  static constexpr auto token_logps_backward = cpu::token_logps_backward;
  static constexpr auto multiply_rows = cpu::multiply_rows;
};

// Stage 2 alone; on other devices it is torch's (docs/decisions.md).
void token_losses(std::int64_t n_tokens, Address logps, Address entropy, Address weights,
                  Address log_ratios, const std::vector<Address>& columns, const std::string& shape,
                  const std::vector<double>& numbers, const std::string& estimator,
                  bool kl_ratio_weighted, double kl_coef, double entropy_coef, Address loss,
                  Address dlogps, Address dlog_ratios, int threads) {
  TokenLossParams params;
  params.n_tokens = n_tokens;
  params.logps = pointer<const double>(logps);
  params.entropy = pointer<const float>(entropy);
  params.weights = pointer<const float>(weights);
  params.log_ratios = pointer<const double>(log_ratios);
  fill(params.columns, kTokenColumns, columns, pointer<const float>);
  params.policy = make_policy(shape, numbers);
  params.regularizers = {kl_estimator(estimator), kl_ratio_weighted, kl_coef, entropy_coef};
  params.loss = pointer<float>(loss);
  params.dlogps = pointer<double>(dlogps);
  params.dlog_ratios = pointer<double>(dlog_ratios);
  cpu::token_losses(params, CpuKernels::execution(threads));
}

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
  m.def("token_columns", [] { return cfpo::bindings::names(cfpo::kTokenColumns); });
  m.def("policy_numbers", [] { return cfpo::bindings::names(cfpo::kPolicyNumbers); });
  m.def("policy_term", &cfpo::bindings::policy_term, py::kw_only(), py::arg("shape"),
        py::arg("numbers"), py::arg("logp"), py::arg("log_ratio"), py::arg("advantage"),
        py::arg("low"), py::arg("high"), py::arg("token_weight"));
  m.def("first_bad_token", &cfpo::bindings::first_bad_token,
        py::call_guard<py::gil_scoped_release>(), py::arg("token_ids"), py::arg("weights"),
        py::arg("n_rows"), py::arg("n_cols"));
  m.def("kl_term", &cfpo::bindings::kl_term, py::kw_only(), py::arg("estimator"),
        py::arg("distance"), py::arg("log_ratio"), py::arg("ratio_weighted"));
  m.def("token_losses", &cfpo::bindings::token_losses, py::call_guard<py::gil_scoped_release>(),
        py::arg("n_tokens"), py::arg("logps"), py::arg("entropy"), py::arg("weights"),
        py::arg("log_ratios"), py::arg("columns"), py::arg("shape"), py::arg("numbers"),
        py::arg("kl_estimator"), py::arg("kl_ratio_weighted"), py::arg("kl_coef"),
        py::arg("entropy_coef"), py::arg("loss"), py::arg("dlogps"), py::arg("dlog_ratios"),
        py::arg("threads"));
  cfpo::bindings::bind_kernels<cfpo::bindings::CpuKernels, int>(m, py::arg("threads"));
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
