// The Python module cfpo_kernels._C: numbers in, raw pointers through, exceptions out.
//
// Torch-free on purpose: one build serves every torch version. cfpo_kernels/backends/cpu.py is the
// only caller, and has checked every argument before it hands over an address.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/parallel.h"

#if defined(CFPO_WITH_CUDA)
#include "cuda/device_query.h"
#endif

namespace py = pybind11;

namespace cfpo {
namespace {

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// (address, dtype, n_rows, n_cols, inner, outer_stride, inner_stride); see core/params.h
using RowsTuple = std::tuple<std::uintptr_t, int, std::int64_t, std::int64_t, std::int64_t,
                             std::int64_t, std::int64_t>;

Rows make_rows(const std::optional<RowsTuple>& given) {
  Rows rows;
  if (!given) return rows;
  const auto& [address, dtype, n_rows, n_cols, inner, outer_stride, inner_stride] = *given;
  rows.data = pointer<void>(address);
  rows.dtype = static_cast<DType>(dtype);
  rows.n_rows = n_rows;
  rows.n_cols = n_cols;
  rows.inner = inner;
  rows.outer_stride = outer_stride;
  rows.inner_stride = inner_stride;
  return rows;
}

Problem make_problem(const RowsTuple& logits, std::uintptr_t token_ids, std::uintptr_t temperature,
                     std::int64_t temperature_stride, std::uintptr_t weights) {
  return {make_rows(logits), pointer<const std::int64_t>(token_ids),
          pointer<const float>(temperature), temperature_stride, pointer<const float>(weights)};
}

KlEstimator kl_estimator(const std::string& name) {
  if (name == "k1") return KlEstimator::kK1;
  if (name == "k2") return KlEstimator::kK2;
  if (name == "k3") return KlEstimator::kK3;
  throw std::invalid_argument("unknown KL estimator '" + name + "'");
}

// Calls run(policy) with the objective of that name.
template <class Run>
void with_policy(const std::string& name, const std::vector<double>& parameters, Run run) {
  if (name == "cfpo" && parameters.size() == 2) {
    run(Cfpo<double>{parameters[0], parameters[1]});
  } else if (name == "ppo_clip" && parameters.size() == 3) {
    run(PpoClip<double>{parameters[0], parameters[1], parameters[2]});
  } else {
    throw std::invalid_argument("unknown objective '" + name + "'");
  }
}

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

void policy_loss(const RowsTuple& logits, const std::optional<RowsTuple>& dlogits,
                 std::uintptr_t token_ids, std::uintptr_t temperature,
                 std::int64_t temperature_stride, std::uintptr_t weights, std::uintptr_t advantages,
                 std::uintptr_t old_logps, std::uintptr_t token_weights, std::uintptr_t ref_logps,
                 const std::string& objective, const std::vector<double>& objective_parameters,
                 const std::string& estimator, double kl_coef, double entropy_coef,
                 std::uintptr_t grad_scale, std::uintptr_t loss, std::uintptr_t logps,
                 std::uintptr_t entropy, int threads, const std::string& level) {
  PolicyLossParams params;
  params.problem = make_problem(logits, token_ids, temperature, temperature_stride, weights);
  params.dlogits = make_rows(dlogits);
  params.advantages = pointer<const float>(advantages);
  params.old_logps = pointer<const float>(old_logps);
  params.token_weights = pointer<const float>(token_weights);
  params.ref_logps = pointer<const float>(ref_logps);
  params.regularizers = {kl_estimator(estimator), kl_coef, entropy_coef};
  params.grad_scale = pointer<const float>(grad_scale);
  params.loss = pointer<float>(loss);
  params.logps = pointer<float>(logps);
  params.entropy = pointer<float>(entropy);
  with_policy(objective, objective_parameters,
              [&](const auto& policy) { cpu::policy_loss(params, policy, {threads, level}); });
}

void token_logps(const RowsTuple& logits, std::uintptr_t token_ids, std::uintptr_t temperature,
                 std::int64_t temperature_stride, std::uintptr_t weights, std::uintptr_t logps,
                 std::uintptr_t lse, std::uintptr_t entropy, int threads,
                 const std::string& level) {
  const TokenLogpsParams params{
      make_problem(logits, token_ids, temperature, temperature_stride, weights),
      pointer<float>(logps), pointer<double>(lse), pointer<float>(entropy)};
  cpu::token_logps(params, {threads, level});
}

void token_logps_backward(const RowsTuple& logits, const RowsTuple& dlogits,
                          std::uintptr_t token_ids, std::uintptr_t temperature,
                          std::int64_t temperature_stride, std::uintptr_t weights,
                          std::uintptr_t lse, std::uintptr_t entropy, std::uintptr_t dlogps,
                          std::uintptr_t dentropy, int threads, const std::string& level) {
  const TokenLogpsBackwardParams params{
      make_problem(logits, token_ids, temperature, temperature_stride, weights),
      make_rows(dlogits),
      pointer<const double>(lse),
      pointer<const float>(entropy),
      pointer<const float>(dlogps),
      pointer<const float>(dentropy)};
  cpu::token_logps_backward(params, {threads, level});
}

void multiply_rows(const RowsTuple& rows, std::uintptr_t factors, std::int64_t factor_stride,
                   int threads, const std::string& level) {
  cpu::multiply_rows(make_rows(rows), pointer<const float>(factors), factor_stride,
                     {threads, level});
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
}  // namespace cfpo

PYBIND11_MODULE(_C, m) {
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  cfpo::cpu::ForkGuard::install();
  m.def("cpu_levels", &cfpo::cpu::supported_levels);
  m.def("objective_term", &cfpo::objective_term);
  m.def("kl_term", &cfpo::kl_estimate);
  m.def("policy_loss", &cfpo::policy_loss, Unlocked(), py::kw_only(), py::arg("logits"),
        py::arg("dlogits"), py::arg("token_ids"), py::arg("temperature"),
        py::arg("temperature_stride"), py::arg("weights"), py::arg("advantages"),
        py::arg("old_logps"), py::arg("token_weights"), py::arg("ref_logps"), py::arg("objective"),
        py::arg("objective_parameters"), py::arg("kl_estimator"), py::arg("kl_coef"),
        py::arg("entropy_coef"), py::arg("grad_scale"), py::arg("loss"), py::arg("logps"),
        py::arg("entropy"), py::arg("threads"), py::arg("level"));
  m.def("token_logps", &cfpo::token_logps, Unlocked(), py::kw_only(), py::arg("logits"),
        py::arg("token_ids"), py::arg("temperature"), py::arg("temperature_stride"),
        py::arg("weights"), py::arg("logps"), py::arg("lse"), py::arg("entropy"),
        py::arg("threads"), py::arg("level"));
  m.def("token_logps_backward", &cfpo::token_logps_backward, Unlocked(), py::kw_only(),
        py::arg("logits"), py::arg("dlogits"), py::arg("token_ids"), py::arg("temperature"),
        py::arg("temperature_stride"), py::arg("weights"), py::arg("lse"), py::arg("entropy"),
        py::arg("dlogps"), py::arg("dentropy"), py::arg("threads"), py::arg("level"));
  m.def("multiply_rows", &cfpo::multiply_rows, Unlocked(), py::kw_only(), py::arg("rows"),
        py::arg("factors"), py::arg("factor_stride"), py::arg("threads"), py::arg("level"));
#if defined(CFPO_WITH_CUDA)
  m.attr("cuda_built") = true;
  m.def("cuda_query", &cfpo::cuda_query);
#else
  m.attr("cuda_built") = false;
#endif
  m.attr("cuda_archs") = CFPO_CUDA_ARCHS;
  m.attr("cuda_reason") = CFPO_CUDA_REASON;
}
