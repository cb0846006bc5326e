// Logits behind a softcap make a stage a type of its own, so that the kernels of the others have
// nothing of it.
#pragma once

#include "core/row_math.h"

namespace cfpo::cuda {

template <class Stage>
struct Capped : Stage {};

template <class Stage>
constexpr bool kCapped = false;
template <class Stage>
constexpr bool kCapped<Capped<Stage>> = true;

// What the gradient of a logit is multiplied by.
template <bool kOfSoftcap>
struct Slope {
  float inverse_softcap;

  CFPO_HOST_DEVICE float operator()(float logit) const {
    return kOfSoftcap ? softcap_slope(logit, inverse_softcap) : 1.0f;
  }
};

template <class Stage>
CFPO_HOST_DEVICE Slope<kCapped<Stage>> slope_of(const Stage& stage) {
  return {stage.p.problem.inverse_softcap};
}

}  // namespace cfpo::cuda
