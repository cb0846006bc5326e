// From what a row stores to its logits.
#pragma once

#include "core/row_math.h"
#include "core/softcap.h"
#include "cuda/capped.h"
#include "cuda/primitives.h"

namespace cfpo::cuda {

// Here they are the same.
template <bool kOfSoftcap>
struct LogitMap {
  static constexpr bool kCaps = false;

  CFPO_HOST_DEVICE float operator()(float x) const { return x; }
  // What the gradient is multiplied by, from the logit.
  CFPO_HOST_DEVICE float slope(float) const { return 1.0f; }
  // The same of a row's target; a column of -1 has no element, and `x` is already what counts.
  CFPO_HOST_DEVICE float target(std::int64_t, float x) const { return x; }
};

template <>
struct LogitMap<true> {
  static constexpr bool kCaps = true;
  Softcap softcap;

  CFPO_DEVICE float operator()(float x) const {
    using Ratio = TanhRatio<float>;
    constexpr Ratio ratio{};
    const float limit = Ratio::kLimit * softcap.cap, size = std::fabs(x);
    const float within = size > limit ? limit : size;  // NaN stays NaN
    const float t = within * softcap.inverse, s = t * t;
    float p = ratio.p[Ratio::kDegree], q = ratio.q[Ratio::kDegree];
    for (int i = Ratio::kDegree - 1; i >= 0; --i) {
      p = std::fma(p, s, ratio.p[i]);
      q = std::fma(q, s, ratio.q[i]);
    }
    return std::copysign(within * hw::divide_approx(p, q), x);
  }
  CFPO_HOST_DEVICE float slope(float y) const { return softcap_slope(softcap, y); }
  CFPO_HOST_DEVICE double target(std::int64_t column, float x) const {
    return column < 0 ? x : capped_logit(softcap, x);
  }
};

template <bool kOfSoftcap>
CFPO_HOST_DEVICE LogitMap<kOfSoftcap> map_of(const Problem& problem) {
  if constexpr (kOfSoftcap) {
    return {problem.softcap};
  } else {
    return {};
  }
}
template <class Stage>
CFPO_HOST_DEVICE LogitMap<kCapped<Stage>> map_of(const Stage& stage) {
  return map_of<kCapped<Stage>>(stage.p.problem);
}

}  // namespace cfpo::cuda
