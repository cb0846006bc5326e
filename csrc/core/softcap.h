// The softcap of logits, y = c tanh(x / c), from x.
//
// tanh(t) / t = P(s) / Q(s) with s = t^2, minimax over |t| <= kLimit, where tanh is 1. Small logits
// pass as they are, since P(0) / Q(0) is 1 exactly; with positive coefficients alone nothing
// cancels. The sweeps evaluate it in float32, in as many ways as there are instruction sets; a
// row's target is capped in float64, as its other scalars are. Errors: docs/maths.md.
#pragma once

#include <cmath>

#include "core/host_device.h"

namespace cfpo {

struct Softcap {
  float cap = 0.0f;      // c; 0: the logits are not capped
  float inverse = 0.0f;  // 1 / c
  double exact_inverse = 0.0;

  Softcap() = default;
  explicit Softcap(double c)
      : cap(static_cast<float>(c)), inverse(static_cast<float>(1.0 / c)), exact_inverse(1.0 / c) {}
};

// Coefficients are members, and those who use them make a constant of it: device code sees no
// static arrays of a host.
template <class Real>
struct TanhRatio;

template <>
struct TanhRatio<float> {  // 2.2e-8; rounded coefficients: 3.2e-8
  static constexpr float kLimit = 9.0f;
  static constexpr int kDegree = 4;
  float p[kDegree + 1] = {1.0f, 1.3383979e-1f, 3.4989945e-3f, 2.0661231e-5f, 1.3419784e-8f};
  float q[kDegree + 1] = {1.0f, 4.67173e-1f, 2.58902e-2f, 3.2910355e-4f, 7.8047117e-7f};
};

template <>
struct TanhRatio<double> {  // 1.4e-10; beyond the limit 4e-9
  static constexpr double kLimit = 10.0;
  static constexpr int kDegree = 5;
  double p[kDegree + 1] = {1.0,
                           0.14063694377262803,
                           0.0043787010891092086,
                           4.1063718012462206e-05,
                           1.0433093704830727e-07,
                           3.2584062372959645e-11};
  double q[kDegree + 1] = {1.0,
                           0.47397027620493626,
                           0.029035461658902424,
                           0.00049176660293504134,
                           2.4921151526638139e-06,
                           2.7003818103106189e-09};
};

// Of a row's target. Infinities become +-c; NaN stays NaN.
CFPO_HOST_DEVICE inline double capped_logit(const Softcap& softcap, float logit) {
  using Ratio = TanhRatio<double>;
  constexpr Ratio ratio{};
  const double limit = Ratio::kLimit * softcap.cap;
  const double x = logit < -limit ? -limit : logit > limit ? limit : logit;
  const double t = x * softcap.exact_inverse, s = t * t;
  double p = ratio.p[Ratio::kDegree], q = ratio.q[Ratio::kDegree];
  for (int i = Ratio::kDegree - 1; i >= 0; --i) {
    p = std::fma(p, s, ratio.p[i]);
    q = std::fma(q, s, ratio.q[i]);
  }
  return x * (p / q);
}

// dy/dx, from y.
CFPO_HOST_DEVICE inline float softcap_slope(const Softcap& softcap, float y) {
  const float t = y * softcap.inverse;
  return std::fmax(std::fma(-t, t, 1.0f), 0.0f);  // |y| may be rounded to more than c
}

}  // namespace cfpo
