// The four kernel functions as Python functions, for any set of kernels: the CPU's, CUDA's, and
// CUDA's as emulated in the tests. Numbers and tensors' addresses in, exceptions out.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "core/params.h"

namespace cfpo::bindings {

namespace py = pybind11;

// Where a tensor's numbers are, from the tensor or as a number; None: null.
struct Address {
  std::uintptr_t value = 0;
};

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address.value);
}

}  // namespace cfpo::bindings

template <>
struct pybind11::detail::type_caster<cfpo::bindings::Address> {
  PYBIND11_TYPE_CASTER(cfpo::bindings::Address, const_name("int | Tensor | None"));

  bool load(handle source, bool) {
    if (source.is_none()) return true;
    // Asked from here, this is a call that Python need not spell out for each argument.
    const object number =
        PyLong_Check(source.ptr()) ? reinterpret_borrow<object>(source) : source.attr("data_ptr")();
    value.value = number.cast<std::uintptr_t>();
    return true;
  }
};

namespace cfpo::bindings {

// (address, dtype, n_rows, n_cols, inner, outer_stride, inner_stride); see core/params.h
using RowsTuple =
    std::tuple<Address, int, std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t>;

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

inline Problem make_problem(const RowsTuple& logits, Address token_ids, Address temperature,
                            std::int64_t temperature_stride, Address weights, bool sharded,
                            double softcap) {
  return {make_rows(logits),
          pointer<const std::int64_t>(token_ids),
          pointer<const float>(temperature),
          temperature_stride,
          pointer<const float>(weights),
          sharded,
          softcap == 0.0 ? Softcap() : Softcap(softcap)};
}

template <class T>
using Names = std::initializer_list<std::pair<const char*, T>>;

// What a name stands for; the error lists the others.
template <class T>
T named(const char* what, const std::string& name, Names<T> known) {
  std::string names;
  for (const auto& [its, value] : known) {
    if (name == its) return value;
    names += names.empty() ? its : std::string(", ") + its;
  }
  throw std::invalid_argument("unknown " + std::string(what) + " '" + name + "', not one of " +
                              names);
}

inline KlEstimator kl_estimator(const std::string& name) {
  return named<KlEstimator>("KL estimator", name,
                            {{"k1", KlEstimator::kK1},
                             {"k2", KlEstimator::kK2},
                             {"k3", KlEstimator::kK3},
                             {"k1+", KlEstimator::kK1Plus},
                             {"k3+", KlEstimator::kK3Plus}});
}

// Fills the members that a table names from a list in its order.
template <class Struct, class Value, std::size_t kCount, class Given, class Convert>
void fill(Struct& filled, const std::pair<const char*, Value Struct::*> (&table)[kCount],
          const std::vector<Given>& given, Convert convert) {
  if (given.size() != kCount) {
    throw std::invalid_argument("expected " + std::to_string(kCount) + " numbers, got " +
                                std::to_string(given.size()));
  }
  for (std::size_t i = 0; i < kCount; ++i) filled.*table[i].second = convert(given[i]);
}

template <class Struct, class Value, std::size_t kCount>
std::vector<std::string> names(const std::pair<const char*, Value Struct::*> (&table)[kCount]) {
  std::vector<std::string> found;
  for (const auto& entry : table) found.push_back(entry.first);
  return found;
}

inline Policy make_policy(const std::string& shape, const std::vector<double>& numbers) {
  Policy policy;
  policy.shape = named<Shape>(
      "shape", shape,
      {{"window", Shape::kWindow}, {"quadratic", Shape::kQuadratic}, {"sigmoid", Shape::kSigmoid}});
  fill(policy, kPolicyNumbers, numbers, [](double number) { return number; });
  return policy;
}

// `Kernels` has the four functions as static members; `Where`: the arguments that make an
// Execution: threads and level on the CPU; device, stream, workspace and row kernel on a GPU.
template <class Kernels, class... Where>
void policy_loss(const RowsTuple& logits, Address token_ids, Address temperature,
                 std::int64_t temperature_stride, Address weights, bool sharded, double softcap,
                 const std::optional<RowsTuple>& dlogits, const std::vector<Address>& columns,
                 const std::string& shape, const std::vector<double>& numbers,
                 const std::string& estimator, bool kl_ratio_weighted, double kl_coef,
                 double entropy_coef, Address grad_scale, Address loss, Address logps,
                 Address entropy, Where... where) {
  PolicyLossParams params;
  params.problem =
      make_problem(logits, token_ids, temperature, temperature_stride, weights, sharded, softcap);
  params.dlogits = make_rows(dlogits);
  fill(params.columns, kTokenColumns, columns, pointer<const float>);
  params.policy = make_policy(shape, numbers);
  params.regularizers = {kl_estimator(estimator), kl_ratio_weighted, kl_coef, entropy_coef};
  params.grad_scale = pointer<const float>(grad_scale);
  params.loss = pointer<float>(loss);
  params.logps = pointer<float>(logps);
  params.entropy = pointer<float>(entropy);
  Kernels::policy_loss(params, Kernels::execution(where...));
}

template <class Kernels, class... Where>
void token_logps(const RowsTuple& logits, Address token_ids, Address temperature,
                 std::int64_t temperature_stride, Address weights, bool sharded, double softcap,
                 Address logps, Address lse, Address entropy, Where... where) {
  const TokenLogpsParams params{
      make_problem(logits, token_ids, temperature, temperature_stride, weights, sharded, softcap),
      pointer<double>(logps), pointer<Lse>(lse), pointer<float>(entropy)};
  Kernels::token_logps(params, Kernels::execution(where...));
}

template <class Kernels, class... Where>
void token_logps_backward(const RowsTuple& logits, Address token_ids, Address temperature,
                          std::int64_t temperature_stride, Address weights, bool sharded,
                          double softcap, const RowsTuple& dlogits, Address lse, Address entropy,
                          Address dlogps, Address dentropy, Where... where) {
  const TokenLogpsBackwardParams params{
      make_problem(logits, token_ids, temperature, temperature_stride, weights, sharded, softcap),
      make_rows(dlogits),
      pointer<const Lse>(lse),
      pointer<const float>(entropy),
      pointer<const float>(dlogps),
      pointer<const float>(dentropy)};
  Kernels::token_logps_backward(params, Kernels::execution(where...));
}

template <class Kernels, class... Where>
void multiply_rows(const RowsTuple& rows, Address factors, std::int64_t factor_stride,
                   Where... where) {
  Kernels::multiply_rows(make_rows(rows), pointer<const float>(factors), factor_stride,
                         Kernels::execution(where...));
}

template <class Kernels, class... Where, class... Arguments>
void bind_kernels(py::module_& m, const Arguments&... where) {
  static_assert(sizeof...(Where) == sizeof...(Arguments));
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  m.def("policy_loss", &policy_loss<Kernels, Where...>, Unlocked(), py::arg("logits"),
        py::arg("token_ids"), py::arg("temperature"), py::arg("temperature_stride"),
        py::arg("weights"), py::arg("sharded"), py::arg("softcap"), py::arg("dlogits"),
        py::arg("columns"), py::arg("shape"), py::arg("numbers"), py::arg("kl_estimator"),
        py::arg("kl_ratio_weighted"), py::arg("kl_coef"), py::arg("entropy_coef"),
        py::arg("grad_scale"), py::arg("loss"), py::arg("logps"), py::arg("entropy"), where...);
  m.def("token_logps", &token_logps<Kernels, Where...>, Unlocked(), py::arg("logits"),
        py::arg("token_ids"), py::arg("temperature"), py::arg("temperature_stride"),
        py::arg("weights"), py::arg("sharded"), py::arg("softcap"), py::arg("logps"),
        py::arg("lse"), py::arg("entropy"), where...);
  m.def("token_logps_backward", &token_logps_backward<Kernels, Where...>, Unlocked(),
        py::arg("logits"), py::arg("token_ids"), py::arg("temperature"),
        py::arg("temperature_stride"), py::arg("weights"), py::arg("sharded"), py::arg("softcap"),
        py::arg("dlogits"), py::arg("lse"), py::arg("entropy"), py::arg("dlogps"),
        py::arg("dentropy"), where...);
  m.def("multiply_rows", &multiply_rows<Kernels, Where...>, Unlocked(), py::arg("rows"),
        py::arg("factors"), py::arg("factor_stride"), where...);
}

}  // namespace cfpo::bindings
