// What stages 1 and 3 pass on: sums over part of a row, and the coefficients of its gradient.
#pragma once

#include "core/host_device.h"

namespace cfpo {

// References beyond this are floats too far apart to be near anything; |logit| / T of 1.5e9.
constexpr float kLargestRef = 2147483648.0f;

// Sums over part of a row, with u_v = z_v * scale - ref in units of log2 (scale = log2(e) / T).
// `ref` is an integer, so that partial sums of one row merge by exact powers of two.
struct PartialSum {
  float ref;       // -inf where a search for it found nothing above -inf
  float sum;       // sum_v 2^u_v
  float weighted;  // sum_v u_v 2^u_v, only where entropy is asked for
};

// d_v = 2^u_v * (constant + linear * u_v)
struct GradientCoefs {
  float scale;
  float ref;
  float constant;
  float linear;  // 0 unless the entropy's gradient is wanted
};

// T * logsumexp(z / T) of a row, as a logit near it and what it is above that: float32 would lose a
// common offset, and a single float64 what a likely token leaves. `anchor` is the logit of such a
// token, so that `above` is -T log p of it.
struct Lse {
  double anchor = 0.0;
  double above = 0.0;

  CFPO_HOST_DEVICE double total() const { return anchor + above; }
  // Of a token with this logit, T log p.
  template <class Logit>
  CFPO_HOST_DEVICE double below(Logit logit) const {
    return static_cast<double>(logit) - anchor - above;
  }
};

}  // namespace cfpo
