// dispatch.cpp turns a dtype into a type and calls these; each file in instances/ compiles them for
// one stage and one dtype. Host C++ without any CUDA header.
#pragma once

#include "core/stages.h"
#include "cuda/capped.h"
#include "cuda/kernels.h"

namespace cfpo::cuda {

// All kernels of one stage for one storage type; `dlogits` without data: no gradient.
template <class T, class Stage>
void run_stage(const Stage& stage, const Rows& dlogits, const Execution& execution);

template <class T>
void run_multiply(const Rows& rows, const float* factors, std::int64_t factor_stride,
                  const Execution& execution);

}  // namespace cfpo::cuda
