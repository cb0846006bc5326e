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
  double inverse_sum;
  double log_sum;     // nats
  double logp;        // of the target, nats
  double p;           // e^logp
  double complement;  // 1 - p, to full relative accuracy
  double entropy;     // nats; meaningless unless asked for
  double anchor;      // a logit: the peak's where there is one, else the target's,
  double log_anchor;  // and log p of it

  CFPO_HOST_DEVICE Lse lse() const {
    const double t = kLog2E / scale;
    if (log_anchor > -kLn2) return {anchor, -log_anchor * t};
    return {ref / static_cast<double>(scale), log_sum * t};
  }
};

// What stage 3 needs: d_v = coefs(v) off the target, and the target's own value.
struct RowGradient {
  GradientCoefs coefs{};
  float target = 0.0f;
};

CFPO_HOST_DEVICE inline float row_scale(const Problem& p, std::int64_t row) {
  return static_cast<float>(kLog2E / p.temperature[row * p.temperature_stride]);
}

// 2^exponent for a whole exponent <= 0; 0 where that would be subnormal, and for NaN: only sums
// that are NaN themselves have such references.
template <class Real>
CFPO_HOST_DEVICE double power_of_two(Real exponent) {
  const int whole = static_cast<int>(exponent > Real{-1023} ? exponent : Real{-1023});
  const std::int64_t bits = static_cast<std::int64_t>(whole + 1023) << 52;
  double power;
  std::memcpy(&power, &bits, sizeof power);
  return power;
}

// Sums over part of a row, in float64 and with the reference taken along.
struct RowSum {
  double ref = -INFINITY;
  double sum = 0.0;
  double weighted = 0.0;

  // Without branches, each of which would wait for what is before it.
  CFPO_HOST_DEVICE void rebase(double top) {
    const double down = ref - top;
    const double factor = power_of_two(down);
    weighted = sum == 0.0 ? 0.0 : (weighted + down * sum) * factor;  // 0 * -inf is NaN
    sum *= factor;
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
  RowStats stats;
  stats.scale = scale;
  if (sharded && is_empty(scale, target, rest)) {
    stats.ref = 0.0f;
    stats.sum = stats.p = stats.entropy = 0.0;
    stats.inverse_sum = INFINITY;
    stats.log_sum = stats.logp = stats.log_anchor = -INFINITY;
    stats.anchor = 0.0;
    stats.complement = 1.0;
    return stats;
  }
  const double u = static_cast<double>(target) * scale;
  // A float, because that is what stage 3 takes; any reference near the largest u is exact. A
  // float beyond 2^31 need not be near: such a row is given up rather than got wrong.
  const double ceiling = static_cast<float>(std::ceil(u));
  double top = ceiling > rest.ref ? ceiling : rest.ref;
  if (std::fabs(top) >= kLargestRef) top = NAN;
  rest.rebase(top);
  const double mass = std::exp2(u - top);  // NaN for a target of NaN or +inf, or a row of -inf
  const double log_mass = (u - top) * kLn2;
  const double weighted = rest.weighted + (mass == 0.0 ? 0.0 : (u - top) * mass);
  stats.ref = static_cast<float>(top);
  stats.sum = rest.sum + mass;
  stats.inverse_sum = 1.0 / stats.sum;
  stats.p = mass * stats.inverse_sum;
  stats.complement = rest.sum * stats.inverse_sum;
  // One logarithm for both: of a likely token log p = log(1 - complement), and as in log1p, what
  // rounding takes from 1 - complement comes back behind the logarithm.
  const bool likely = mass > rest.sum;
  const double kept = 1.0 - stats.complement;
  const double lost = stats.complement - (1.0 - kept);
  const double log = std::log(likely ? kept : stats.sum);
  stats.logp = likely ? log - lost : log_mass - log;
  stats.log_sum = likely ? log_mass - stats.logp : log;
  stats.anchor = target;
  stats.log_anchor = stats.logp;
  // Of a likely token two positive terms; see peak_of.
  const double beside = likely ? rest.weighted - (u - top) * rest.sum : weighted;
  stats.entropy = (likely ? -stats.logp : stats.log_sum) - beside * stats.inverse_sum * kLn2;
  return stats;
}

// The stats of a row whose sums an earlier call has left as its lse.
template <class Logit>
CFPO_HOST_DEVICE RowStats stats_from_lse(float scale, Logit target, const Lse& lse,
                                         double entropy) {
  const double log2_total = lse.total() * scale;
  RowStats stats;
  stats.scale = scale;
  stats.ref = static_cast<float>(std::floor(log2_total));
  stats.log_sum = (log2_total - stats.ref) * kLn2;
  stats.sum = std::exp2(log2_total - stats.ref);
  stats.inverse_sum = 1.0 / stats.sum;
  stats.logp = lse.below(target) * scale * kLn2;
  stats.p = std::exp(stats.logp);
  stats.complement = -std::expm1(stats.logp);
  stats.entropy = entropy;
  return stats;
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
  const double inv_t_sum = inv_t * s.inverse_sum;
  const double entropy_term = h == 0.0 || s.p == 0.0 ? 0.0 : h * s.p * (s.logp + s.entropy);
  RowGradient g;
  g.coefs = {s.scale, s.ref, plain_nan(inv_t_sum * (h * (s.entropy - s.log_sum) - c)),
             plain_nan(inv_t_sum * (h * kLn2))};
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
  float peak = -INFINITY;  // its logit
  std::int64_t at = -1;    // where it is: its column, or its segment

  // A segment's sums, and the element that they leave out.
  void add(const RowSum& part, float scale, float logit, std::int64_t where) {
    rest.add(part);
    if (where < 0) return;
    if (logit > peak) {
      const float before = peak;
      peak = logit;
      logit = before;
      at = where;
    }
    if (logit == -INFINITY) return;
    const double u = static_cast<double>(logit) * scale;
    const double ref = std::ceil(u), mass = std::exp2(u - ref);
    rest.add({ref, mass, (u - ref) * mass});
  }
};

struct Peak {
  std::int64_t at = -1;  // none: nothing of the row needs to be computed apart
  float logit = 0.0f;
  double logp = 0.0;
  double entropy = 0.0;  // of the row
  double sum = 0.0;      // of the row, near `ref`
  double log_sum = 0.0;

  // log p of the target stays what it is without an entropy. The sum is for lse, from which a
  // backward finds log p of the peak again.
  CFPO_HOST_DEVICE void apply(RowStats& stats) const {
    stats.entropy = entropy;
    stats.sum = sum;
    stats.inverse_sum = 1.0 / sum;
    stats.log_sum = log_sum;
    stats.anchor = logit;
    stats.log_anchor = logp;
  }
};

// The peak where it has most of the row's mass. With w_v = e^(log p_v - log p_peak) of all others,
//   H = log(1 + sum w) + sum |log w| w / (1 + sum w)
// a sum of positive numbers.
template <class Logit>
CFPO_HOST_DEVICE Peak peak_of(float scale, Logit target, const PeakedSum& sums, double ref) {
  const double u = static_cast<double>(target) * scale;
  const double top = static_cast<double>(sums.peak) * scale;
  if (!(top > u && std::exp2(top - sums.rest.ref) >= sums.rest.sum)) return {};
  const double gap = u - top;
  double mass = gap < -1000.0 ? 0.0 : std::exp2(gap);
  double weighted = mass == 0.0 ? 0.0 : gap * mass;
  if (sums.rest.sum != 0.0) {
    const double factor = std::exp2(sums.rest.ref - top);
    mass += sums.rest.sum * factor;
    weighted += (sums.rest.weighted + (sums.rest.ref - top) * sums.rest.sum) * factor;
  }
  const double logp = -std::log1p(mass);
  return {sums.at,
          sums.peak,
          logp,
          -logp - weighted * kLn2 / (1.0 + mass),
          std::exp2(top - ref) * (1.0 + mass),
          (top - ref) * kLn2 - logp};
}

// Whether a logit that is not the target's is the peak of a row with this lse.
CFPO_HOST_DEVICE inline Peak peak_from_lse(float scale, float logit, const Lse& lse, double entropy,
                                           std::int64_t at) {
  const double logp = lse.below(logit) * scale * kLn2;
  if (!(logp > -kLn2)) return {};
  return {at, logit, logp, entropy};
}

CFPO_HOST_DEVICE inline float peak_gradient(float scale, const Peak& peak,
                                            const RowDerivatives& d) {
  const double p = std::exp(peak.logp);
  return plain_nan(scale * kLn2 * p * (d.h * (peak.logp + peak.entropy) - d.c));
}

}  // namespace cfpo
