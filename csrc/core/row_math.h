// From a row's sums to its log p, entropy and gradient coefficients, in float64: a few dozen
// operations a row, shared by the CPU and the GPU. docs/maths.md derives every line.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/host_device.h"
#include "core/params.h"
#include "core/row_types.h"

namespace cfpo {

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

// What stage 1 leaves of a row; u_v = z_v * scale - ref, p_v = 2^u_v / sum.
struct RowStats {
  float scale;  // log2(e) / T
  float ref;
  double sum;
  double logp;        // of the target, nats
  double complement;  // 1 - p of the target, to full relative accuracy
  double entropy;     // nats; 0 unless asked for

  // T * logsumexp(z / T)
  CFPO_HOST_DEVICE double lse() const { return (ref + std::log2(sum)) / scale; }
};

// What stage 3 needs: d_v = coefs(v) off the target, and the target's own value.
struct RowGradient {
  GradientCoefs coefs{};
  float target = 0.0f;
};

CFPO_HOST_DEVICE inline float row_scale(const Problem& p, std::int64_t row) {
  return static_cast<float>(kLog2E / p.temperature[row * p.temperature_stride]);
}

// 2^exponent for a whole exponent <= 0, or NaN; what would be subnormal is 0.
CFPO_HOST_DEVICE inline double power_of_two(double exponent) {
  if (!(exponent >= -1022.0)) return exponent != exponent ? exponent : 0.0;
  const std::int64_t bits = (static_cast<std::int64_t>(exponent) + 1023) << 52;
  double power;
  std::memcpy(&power, &bits, sizeof power);
  return power;
}

// Sums over part of a row, in float64 and with the reference taken along.
struct RowSum {
  double ref = -INFINITY;
  double sum = 0.0;
  double weighted = 0.0;

  CFPO_HOST_DEVICE void rebase(double top) {
    if (sum != 0.0) {
      const double factor = power_of_two(ref - top);
      weighted = (weighted + (ref - top) * sum) * factor;
      sum *= factor;
    }
    ref = top;
  }
  CFPO_HOST_DEVICE void add(RowSum part) {
    const double top = std::fmax(ref, part.ref);
    rebase(top);
    part.rebase(top);
    sum += part.sum;
    weighted += part.weighted;
  }
};

// A target's `Logit` is a float as it lies in the row, or a double that has been capped.

// A shard without any mass: bans alone, as low as those that are zeros beside any other row.
template <class Logit>
CFPO_HOST_DEVICE bool is_empty(float scale, Logit target, const RowSum& rest) {
  const double top = std::fmax(rest.ref, static_cast<double>(target) * scale);
  return top <= -kLargestRef && target == target && rest.sum == rest.sum;
}

// Joins the target, which the sums leave out, with the rest of its row. That way 1 - p and log p
// of a likely token keep their relative accuracy.
template <class Logit>
CFPO_HOST_DEVICE RowStats join_target(float scale, Logit target, RowSum rest,
                                      bool sharded = false) {
  if (sharded && is_empty(scale, target, rest)) return {scale, 0.0f, 0.0, -INFINITY, 1.0, 0.0};
  const double u = static_cast<double>(target) * scale;
  // A float, because that is what stage 3 takes; any reference near the largest u is exact. A
  // float beyond 2^31 need not be near: such a row is given up rather than got wrong.
  double top = std::fmax(rest.ref, static_cast<double>(static_cast<float>(std::ceil(u))));
  if (std::fabs(top) >= kLargestRef) top = NAN;
  rest.rebase(top);
  const double mass = std::exp2(u - top);  // NaN for a target of NaN or +inf, or a row of -inf
  const double sum = rest.sum + mass;
  const double weighted = rest.weighted + (mass == 0.0 ? 0.0 : (u - top) * mass);
  const double log2_sum = std::log2(sum);
  RowStats stats;
  stats.scale = scale;
  stats.ref = static_cast<float>(top);
  stats.sum = sum;
  stats.logp = mass > rest.sum ? 0.0 - std::log1p(rest.sum / mass) : (u - top - log2_sum) * kLn2;
  stats.complement = rest.sum / sum;
  stats.entropy = (log2_sum - weighted / sum) * kLn2;
  return stats;
}

// The stats of a row whose sums an earlier call has left as its lse.
template <class Logit>
CFPO_HOST_DEVICE RowStats stats_from_lse(float scale, Logit target, double lse, double entropy) {
  const double log2_total = lse * scale;
  const float ref = static_cast<float>(std::floor(log2_total));
  const double logp = (static_cast<double>(target) * scale - log2_total) * kLn2;
  return {scale, ref, std::exp2(log2_total - ref), logp, -std::expm1(logp), entropy};
}

// A NaN that came from outside may carry bits that rounding to bfloat16 would turn into a number.
CFPO_HOST_DEVICE inline float plain_nan(double x) {
  return x != x ? static_cast<float>(NAN) : static_cast<float>(x);
}

// c = d loss / d logp, h = the factor of p_v (log p_v + H)
struct RowDerivatives {
  double c = 0.0;
  double h = 0.0;
};

// 1/T comes from scale.
CFPO_HOST_DEVICE inline RowGradient row_gradient(const RowStats& s, const RowDerivatives& d) {
  const double c = d.c, h = d.h;
  const double inv_t = s.scale * kLn2;
  const double p = std::exp(s.logp);
  const double log_sum = std::log(s.sum);
  const double entropy_term = h == 0.0 || p == 0.0 ? 0.0 : h * p * (s.logp + s.entropy);
  RowGradient g;
  g.coefs = {s.scale, s.ref, plain_nan(inv_t * (h * (s.entropy - log_sum) - c) / s.sum),
             plain_nan(inv_t * h * kLn2 / s.sum)};
  g.target = plain_nan(inv_t * (c * s.complement + entropy_term));
  return g;
}

// Entropy of confident rows. Where one element has nearly all the mass, log p of it and H are small
// differences, unless it stays out of the float32 sums as the target does.

// Below, 1 - p of the likeliest token is at most 5e-3, and float32 begins to lose log p + H.
constexpr float kPeakedEntropy = 0.02f;

// A row's sums without the target and without the likeliest of the others, the peak.
struct PeakedSum {
  RowSum rest;
  double peak = -INFINITY;  // u of it, without a reference
  std::int64_t column = -1;

  // A segment's sums, and the element that they leave out.
  void add(const RowSum& part, double u, std::int64_t at) {
    rest.add(part);
    if (at < 0) return;
    if (u > peak) {
      const double before = peak;
      peak = u;
      u = before;
      column = at;
    }
    if (u == -INFINITY) return;
    const double ref = std::ceil(u), mass = std::exp2(u - ref);
    rest.add({ref, mass, (u - ref) * mass});
  }
};

struct Peak {
  std::int64_t column = -1;  // none: nothing of the row needs to be computed apart
  double logp = 0.0;
};

// Sets the entropy where the peak or the target has most of the row's mass, and says which column
// is the peak if it does. With w_v = e^(log p_v - log p_max) of all but the likeliest,
//   H = log(1 + sum w) + sum |log w| w / (1 + sum w)
// a sum of positive numbers.
inline Peak entropy_of_peaked(RowStats& stats, double target, PeakedSum sums) {
  const double u = target * stats.scale;
  const double top = std::fmax(u, sums.peak), other = std::fmin(u, sums.peak);
  if (!(std::exp2(top - sums.rest.ref) >= sums.rest.sum)) return {};
  const double factor = std::exp2(sums.rest.ref - top), gap = other - top;
  const double others = gap < -1000.0 ? 0.0 : std::exp2(gap);
  double mass = others, weighted = others == 0.0 ? 0.0 : gap * others;
  if (sums.rest.sum != 0.0) {
    mass += sums.rest.sum * factor;
    weighted += (sums.rest.weighted + (sums.rest.ref - top) * sums.rest.sum) * factor;
  }
  const double logp = -std::log1p(mass);
  stats.entropy = -logp - weighted * kLn2 / (1.0 + mass);
  if (top == u) return {};
  // For lse, from which a backward finds log p of the peak again; log p of the target stays what it
  // is without an entropy.
  stats.sum = std::exp2(top - stats.ref) * (1.0 + mass);
  return {sums.column, logp};
}

// The gradient of an element with log p = logp that is not the target.
inline float gradient_apart(const RowStats& s, const RowDerivatives& d, double logp) {
  return plain_nan(s.scale * kLn2 * std::exp(logp) * (d.h * (logp + s.entropy) - d.c));
}

}  // namespace cfpo
