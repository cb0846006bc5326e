// Launches of the CUDA kernels that run their PTX in place of the C++, which then is compiled only
// for its name, which g++ and nvcc mangle alike, and for the sizes of its parameters.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "core/stages.h"
#include "cuda/plan.h"

namespace cfpo::cuda {
struct Grid;
}

namespace emulation {

// Memory that a launch may touch, gathered from the kernel's parameters.
class Ranges {
 public:
  struct Range {
    const char *begin, *end;
    bool write;
  };
  const std::vector<Range>& list() const { return list_; }

  void add(const cfpo::PolicyStage& stage) {
    add(stage.p.problem);
    const cfpo::TokenColumns& columns = stage.p.columns;
    for (const float* x : {columns.advantages, columns.old_logps, columns.token_weights,
                           columns.ref_logps, columns.low, columns.high}) {
      add(x, 4 * n_rows_, false);
    }
    add(stage.p.grad_scale, 4, false);
    for (float* x : {stage.p.loss, stage.p.logps, stage.p.entropy}) add(x, 4 * n_rows_, true);
  }
  void add(const cfpo::LogpsStage& stage) {
    add(stage.p.problem);
    add(stage.p.logps, 8 * n_rows_, true);
    add(stage.p.lse, sizeof(*stage.p.lse) * n_rows_, true);
    add(stage.p.entropy, 4 * n_rows_, true);
  }
  void add(const cfpo::LogpsBackwardStage& stage) {
    add(stage.p.problem);
    add(stage.p.lse, sizeof(*stage.p.lse) * n_rows_, false);
    for (const float* x : {stage.p.entropy, stage.p.dlogps, stage.p.dentropy}) {
      add(x, 4 * n_rows_, false);
    }
  }
  void add(const cfpo::Problem& problem) {
    n_rows_ = static_cast<std::size_t>(problem.logits.n_rows);
    n_segments_ = cfpo::cuda::count_segments(problem.logits.n_cols, problem.logits.dtype);
    add_rows(problem.logits, false);
    add(problem.token_ids, 8 * n_rows_, false);
    add(problem.temperature, problem.temperature_stride != 0 ? 4 * n_rows_ : 4, false);
    add(problem.weights, 4 * n_rows_, false);
  }
  // The gradient, or what is multiplied.
  void add(const cfpo::Rows& rows) {
    if (rows.data != nullptr) n_rows_ = static_cast<std::size_t>(rows.n_rows);
    add_rows(rows, true);
  }
  void add(const cfpo::cuda::SplitWorkspace& workspace) {
    const std::size_t segments = n_rows_ * static_cast<std::size_t>(n_segments_);
    add(workspace.parts, segments * sizeof(cfpo::cuda::PeakedPart), true);
    add(workspace.targets, 4 * n_rows_, true);
  }
  // multiply_kernel's factors, and after them their stride.
  void add(const float* factors) { factors_ = factors; }
  void add(std::int64_t stride) { add(factors_, stride != 0 ? 4 * n_rows_ : 4, false); }
  void add(const cfpo::cuda::RowPlan&) {}
  void add(const cfpo::cuda::ClusterPlan&) {}
  void add(const cfpo::cuda::TransientPlan&) {}

 private:
  void add(const void* p, std::size_t bytes, bool write) {
    const char* begin = static_cast<const char*>(p);
    if (p != nullptr) list_.push_back({begin, begin + bytes, write});
  }
  // From the first row to the last; what is read, by whole vectors.
  void add_rows(const cfpo::Rows& rows, bool write) {
    if (rows.data == nullptr || rows.n_rows == 0) return;
    std::uintptr_t first = UINTPTR_MAX, last = 0;
    for (std::int64_t i = 0; i < rows.n_rows; ++i) {
      const auto begin = reinterpret_cast<std::uintptr_t>(rows.row(i));
      first = std::min(first, begin);
      last = std::max(last, begin + static_cast<std::size_t>(rows.n_cols * dtype_size(rows.dtype)));
    }
    if (!write) first = first / 16 * 16, last = (last + 15) / 16 * 16;
    list_.push_back(
        {reinterpret_cast<const char*>(first), reinterpret_cast<const char*>(last), write});
  }

  std::vector<Range> list_;
  std::size_t n_rows_ = 0;
  int n_segments_ = 0;
  const float* factors_ = nullptr;
};

struct Parameter {
  const void* value;
  std::size_t bytes, align;
};

using RunPtx = void (*)(const void* kernel, const cfpo::cuda::Grid& grid,
                        const std::vector<Parameter>& parameters, const Ranges& ranges);
// Null: the C++ runs.
inline RunPtx& run_ptx() {
  static RunPtx function = nullptr;
  return function;
}

// In launch.cpp, which not every program has.
//
// From here on PTX runs. The loader gives the text of the module that has a kernel, by its mangled
// name; without one the C++ runs again.
using PtxLoader = std::function<std::string(const std::string&)>;
void use_ptx(PtxLoader loader);

}  // namespace emulation
