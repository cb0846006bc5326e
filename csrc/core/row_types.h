// What stages 1 and 3 pass on: sums over part of a row, and the coefficients of its gradient.
#pragma once

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

}  // namespace cfpo
