// The four kernel functions as Python functions, for any set of kernels: the CPU's, CUDA's, and
// CUDA's as emulated in the tests. Numbers in, raw pointers through, exceptions out.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "core/params.h"

namespace cfpo::bindings {

namespace py = pybind11;

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// (address, dtype, n_rows, n_cols, inner, outer_stride, inner_stride); see core/params.h
using RowsTuple = std::tuple<std::uintptr_t, int, std::int64_t, std::int64_t, std::int64_t,
                             std::int64_t, std::int64_t>;

inline Rows make_rows(const std::optional<RowsTuple>& given) {
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

inline Problem make_problem(const RowsTuple& logits, std::uintptr_t token_ids,
                            std::uintptr_t temperature, std::int64_t temperature_stride,
                            std::uintptr_t weights) {
  return {make_rows(logits), pointer<const std::int64_t>(token_ids),
          pointer<const float>(temperature), temperature_stride, pointer<const float>(weights)};
}

inline KlEstimator kl_estimator(const std::string& name) {
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

// `Kernels` has the four functions as static members; `Where` are the arguments that say where and
// how they run, of which Kernels::Execution is made.
template <class Kernels, class... Where>
void policy_loss(const RowsTuple& logits, const std::optional<RowsTuple>& dlogits,
                 std::uintptr_t token_ids, std::uintptr_t temperature,
                 std::int64_t temperature_stride, std::uintptr_t weights, std::uintptr_t advantages,
                 std::uintptr_t old_logps, std::uintptr_t token_weights, std::uintptr_t ref_logps,
                 const std::string& objective, const std::vector<double>& objective_parameters,
                 const std::string& estimator, double kl_coef, double entropy_coef,
                 std::uintptr_t grad_scale, std::uintptr_t loss, std::uintptr_t logps,
                 std::uintptr_t entropy, Where... where) {
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
  with_policy(objective, objective_parameters, [&](const auto& policy) {
    Kernels::policy_loss(params, policy, Kernels::execution(where...));
  });
}

template <class Kernels, class... Where>
void token_logps(const RowsTuple& logits, std::uintptr_t token_ids, std::uintptr_t temperature,
                 std::int64_t temperature_stride, std::uintptr_t weights, std::uintptr_t logps,
                 std::uintptr_t lse, std::uintptr_t entropy, Where... where) {
  const TokenLogpsParams params{
      make_problem(logits, token_ids, temperature, temperature_stride, weights),
      pointer<float>(logps), pointer<double>(lse), pointer<float>(entropy)};
  Kernels::token_logps(params, Kernels::execution(where...));
}

template <class Kernels, class... Where>
void token_logps_backward(const RowsTuple& logits, const RowsTuple& dlogits,
                          std::uintptr_t token_ids, std::uintptr_t temperature,
                          std::int64_t temperature_stride, std::uintptr_t weights,
                          std::uintptr_t lse, std::uintptr_t entropy, std::uintptr_t dlogps,
                          std::uintptr_t dentropy, Where... where) {
  const TokenLogpsBackwardParams params{
      make_problem(logits, token_ids, temperature, temperature_stride, weights),
      make_rows(dlogits),
      pointer<const double>(lse),
      pointer<const float>(entropy),
      pointer<const float>(dlogps),
      pointer<const float>(dentropy)};
  Kernels::token_logps_backward(params, Kernels::execution(where...));
}

template <class Kernels, class... Where>
void multiply_rows(const RowsTuple& rows, std::uintptr_t factors, std::int64_t factor_stride,
                   Where... where) {
  Kernels::multiply_rows(make_rows(rows), pointer<const float>(factors), factor_stride,
                         Kernels::execution(where...));
}

template <class Kernels, class... Where, class... Names>
void bind_kernels(py::module_& m, const Names&... where) {
  static_assert(sizeof...(Where) == sizeof...(Names));
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  m.def("policy_loss", &policy_loss<Kernels, Where...>, Unlocked(), py::kw_only(),
        py::arg("logits"), py::arg("dlogits"), py::arg("token_ids"), py::arg("temperature"),
        py::arg("temperature_stride"), py::arg("weights"), py::arg("advantages"),
        py::arg("old_logps"), py::arg("token_weights"), py::arg("ref_logps"), py::arg("objective"),
        py::arg("objective_parameters"), py::arg("kl_estimator"), py::arg("kl_coef"),
        py::arg("entropy_coef"), py::arg("grad_scale"), py::arg("loss"), py::arg("logps"),
        py::arg("entropy"), where...);
  m.def("token_logps", &token_logps<Kernels, Where...>, Unlocked(), py::kw_only(),
        py::arg("logits"), py::arg("token_ids"), py::arg("temperature"),
        py::arg("temperature_stride"), py::arg("weights"), py::arg("logps"), py::arg("lse"),
        py::arg("entropy"), where...);
  m.def("token_logps_backward", &token_logps_backward<Kernels, Where...>, Unlocked(), py::kw_only(),
        py::arg("logits"), py::arg("dlogits"), py::arg("token_ids"), py::arg("temperature"),
        py::arg("temperature_stride"), py::arg("weights"), py::arg("lse"), py::arg("entropy"),
        py::arg("dlogps"), py::arg("dentropy"), where...);
  m.def("multiply_rows", &multiply_rows<Kernels, Where...>, Unlocked(), py::kw_only(),
        py::arg("rows"), py::arg("factors"), py::arg("factor_stride"), where...);
}

}  // namespace cfpo::bindings
