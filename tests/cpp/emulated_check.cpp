// Runs the CUDA kernels on the emulated device against a naive float64 computation, over vocabulary
// sizes, alignments, masks, strides and devices. A program of its own, so that it can be built with
// sanitizers, and with mistakes planted that it has to find. Exits with 0 if all is well.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "cuda/run.cuh"

namespace cfpo::cuda {
namespace {

using T = bfloat16;

float value_of(T x) {
  float y;
  const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}
T rounded(double x) {
  return {static_cast<std::uint16_t>(hw::float_to_bfloat16(static_cast<float>(x)))};
}
constexpr std::uint16_t kGuard = 0x4242;

// Which rows are masked: every fourth, none, all, all but the last, all but the first and the last
// of 32, all but 5 of 80.
enum class Mask { kFourth, kNone, kAll, kAllButLast, kEdges, kRuns };

struct Case {
  int n_rows, n_cols;
  int in_offset, out_offset;  // elements from an aligned address
  int gap;                    // elements between rows; every third row is followed by more
  bool inplace, entropy;
  DeviceLimits device;
  Mask mask = Mask::kFourth;
  bool no_such_token = false;                 // of the last row
  RowKernel long_rows = RowKernel::kCluster;  // where the device has clusters

  bool masked(int row) const {
    switch (mask) {
      case Mask::kFourth:
        return row % 4 == 3;
      case Mask::kNone:
        return false;
      case Mask::kAll:
        return true;
      case Mask::kAllButLast:
        return row != n_rows - 1;
      case Mask::kEdges:
        return row % 32 != 0 && row % 32 != 31;
      default:
        return row % 80 >= 5;
    }
  }
};

// A matrix in exactly as much memory as its aligned vectors take; what lies between rows is
// guarded.
struct Matrix {
  std::vector<Vector> memory;
  Rows rows;

  Matrix(const Case& c, int offset) {
    rows.dtype = DType::kBFloat16;
    rows.n_rows = c.n_rows;
    rows.n_cols = c.n_cols;
    rows.inner = 3;
    rows.inner_stride = c.n_cols + c.gap;
    rows.outer_stride = 3 * rows.inner_stride + 2 * c.gap;
    const std::int64_t last =
        (c.n_rows - 1) / 3 * rows.outer_stride + (c.n_rows - 1) % 3 * rows.inner_stride + c.n_cols;
    memory.resize(static_cast<std::size_t>((offset + last + 7) / 8));
    rows.data = elements() + offset;
    for (std::size_t i = 0; i < memory.size() * 8; ++i) elements()[i].bits = kGuard;
  }
  T* elements() { return reinterpret_cast<T*>(memory.data()); }
  T* row(int i) { return static_cast<T*>(rows.row(i)); }
  // Elements that are not a row's must be as they were.
  bool guards_hold() {
    std::vector<bool> inside(memory.size() * 8);
    for (int i = 0; i < rows.n_rows; ++i) {
      for (int j = 0; j < rows.n_cols; ++j) inside[row(i) + j - elements()] = true;
    }
    for (std::size_t i = 0; i < inside.size(); ++i) {
      if (!inside[i] && elements()[i].bits != kGuard) return false;
    }
    return true;
  }
};

bool close(double got, double want, double relative, double absolute) {
  return std::fabs(got - want) <= relative * std::fabs(want) + absolute;
}

// One row's loss and gradient by the textbook, without entropy bonus where `h` is 0.
bool row_is_right(const std::vector<double>& z, int target, double advantage, double old_logp,
                  double h, const T* gradient, float loss, float logp, float got_entropy) {
  double top = -INFINITY, sum = 0, entropy = 0;
  for (double x : z) top = std::fmax(top, x);
  for (double x : z) sum += std::exp(x - top);
  const auto log_p = [&](std::size_t j) { return z[j] - top - std::log(sum); };
  for (std::size_t j = 0; j < z.size(); ++j) entropy -= std::exp(log_p(j)) * log_p(j);
  const double r = std::exp(log_p(target) - old_logp), slope = std::fabs(advantage) / 0.2;
  const double want_loss = -(r * advantage - slope / 2 * (r - 1) * (r - 1)) - h * entropy;
  const double c = -r * (advantage - slope * (r - 1));
  if (!close(logp, log_p(target), 1e-6, 1e-6) || !close(loss, want_loss, 1e-5, 2e-5)) return false;
  if (h != 0 && !close(got_entropy, entropy, 2e-5, 1e-12)) return false;
  double error = 0, norm = 0, rounding = 0;
  for (std::size_t j = 0; j < z.size(); ++j) {
    const double p = std::exp(log_p(j)), log_of_p = p == 0 ? 0 : log_p(j);
    const bool is_target = static_cast<int>(j) == target;
    const double want = c * ((is_target ? 1.0 : 0.0) - p) + h * p * (log_of_p + entropy);
    const double got = value_of(gradient[j]);
    if (is_target) {
      if (!close(got, want, 0.0041, 1e-6)) return false;
    } else {
      error += (got - want) * (got - want);
      norm += want * want;
      rounding += std::pow(value_of(rounded(want)) - want, 2);
    }
  }
  return std::sqrt(error) <= 1.1 * std::sqrt(rounding) + 2e-5 * std::sqrt(norm) + 1e-16;
}

bool run(const Case& c) {
  emulation::limits() = c.device;
  std::mt19937 random(c.n_cols * 31 + c.in_offset);
  std::normal_distribution<float> normal(0, 2);
  Matrix logits(c, c.in_offset), apart(c, c.out_offset);
  Matrix& gradient = c.inplace ? logits : apart;
  std::vector<std::vector<double>> z(c.n_rows);
  std::vector<std::int64_t> ids(c.n_rows);
  std::vector<float> weights(c.n_rows), advantages(c.n_rows), old(c.n_rows);
  for (int i = 0; i < c.n_rows; ++i) {
    for (int j = 0; j < c.n_cols; ++j) {
      logits.row(i)[j] = c.masked(i) ? T{0x7FC0} : rounded(normal(random));  // masked rows: NaN
      z[i].push_back(value_of(logits.row(i)[j]));
    }
    ids[i] = static_cast<int>(random() % c.n_cols);
    // The last column of the row; of a segment, which ends in the next one's first vector where the
    // row is shifted.
    if (i == 0) ids[i] = c.n_cols - 1;
    if (i % 3 == 1) ids[i] = std::min<std::int64_t>(ids[i] | 1023, c.n_cols - 1);
    if (c.masked(i)) ids[i] = -100;
    if (c.no_such_token && i == c.n_rows - 1) ids[i] = c.n_cols;
    weights[i] = c.masked(i) ? 0.0f : 1.0f;
    advantages[i] = i % 2 == 0 ? 1.5f : -0.5f;
    if (c.entropy && i % 4 == 2) {
      // Another token has nearly all the mass, and nothing but the entropy has a gradient: at the
      // end of a segment, or of the row.
      const int other = static_cast<int>((ids[i] + c.n_cols / 2) % c.n_cols);
      const int peak = i == 2 ? std::min(other | 1023, c.n_cols - 1) : i == 6 ? 0 : other;
      if (peak != ids[i]) logits.row(i)[peak] = rounded(z[i][peak] = 30);
      advantages[i] = 0.0f;
    }
    double sum = 0;
    for (double x : z[i]) sum += std::exp(x);
    old[i] = c.masked(i) || ids[i] == c.n_cols
                 ? NAN
                 : static_cast<float>(z[i][ids[i]] - std::log(sum) - 0.1);
  }
  std::vector<float> loss(c.n_rows, NAN), logps(c.n_rows, NAN), entropy(c.n_rows, NAN);
  const float temperature = 1.0f;
  PolicyLossParams params{};
  params.problem = {logits.rows, ids.data(), &temperature, 0, weights.data(), false, {}};
  params.dlogits = gradient.rows;
  params.columns.advantages = advantages.data();
  params.columns.old_logps = old.data();
  params.policy.shape = Shape::kQuadratic;
  params.policy.high_positive = params.policy.high_negative = 0.2;
  params.policy.cap = INFINITY;
  params.regularizers = {KlEstimator::kK3, false, 0.0, c.entropy ? 0.1 : 0.0};
  params.loss = loss.data();
  params.logps = logps.data();
  params.entropy = entropy.data();
  std::vector<char> workspace(static_cast<std::size_t>(
      SplitWorkspace::bytes(c.n_rows, count_segments(c.n_cols, DType::kBFloat16))));
  if (!c.entropy) params.entropy = nullptr;
  run_stage<T>(PolicyStage{params}, params.dlogits,
               {0, 0, workspace.data(), c.device.clusters ? c.long_rows : RowKernel::kPortable});

  bool right = logits.guards_hold() && apart.guards_hold();
  if (!right) std::fprintf(stderr, "memory beside the rows was written\n");
  for (int i = 0; i < c.n_rows && right; ++i) {
    if (weights[i] == 0.0f) {
      for (int j = 0; j < c.n_cols; ++j) right = right && gradient.row(i)[j].bits == 0;
      right = right && loss[i] == 0.0f && logps[i] == 0.0f;
    } else if (ids[i] == c.n_cols) {
      for (int j = 0; j < c.n_cols; ++j) right = right && std::isnan(value_of(gradient.row(i)[j]));
      right = right && std::isnan(loss[i]) && std::isnan(logps[i]);
    } else {
      right = row_is_right(z[i], static_cast<int>(ids[i]), advantages[i], old[i],
                           c.entropy ? 0.1 : 0.0, gradient.row(i), loss[i], logps[i], entropy[i]);
    }
    if (!right) std::fprintf(stderr, "row %d is wrong\n", i);
  }
  if (!right) {
    std::fprintf(stderr,
                 "  V %d, offsets %d and %d, gap %d, inplace %d, entropy %d, %d SMs, %d bytes\n",
                 c.n_cols, c.in_offset, c.out_offset, c.gap, c.inplace, c.entropy,
                 c.device.sm_count, c.device.shared_per_block);
  }
  return right;
}

int count = 0;

// The first case that is wrong is enough.
void check(const Case& c) {
  ++count;
  if (!run(c)) std::exit(1);
}

constexpr auto kOrders = {emulation::Order::kForward, emulation::Order::kBackward,
                          emulation::Order::kShuffled, emulation::Order::kStarved};

void check_rows() {
  const DeviceLimits one_sm{1, 227 * 1024, 228 * 1024};
  const DeviceLimits small{1, 56 * 1024, 64 * 1024};  // long rows are read again
  const DeviceLimits large{132, 227 * 1024, 228 * 1024};
  for (const auto order : kOrders) {
    if (order == emulation::Order::kShuffled || order == emulation::Order::kStarved) continue;
    emulation::machine().order = order;
    for (const int v : {1, 7, 64, 1000, 1024, 1031, 4100, 9000, 36000}) {
      for (const int offset : {0, 1, 6}) {
        for (const bool inplace : {false, true}) {
          for (const DeviceLimits& device : {one_sm, small, large}) {
            if (device.sm_count > 1 && v < 32 * 1024) continue;  // nothing to split
            const int rows = v > 8000 ? 3 : 9;
            check({rows, v, offset, inplace ? offset : 7 - offset, v % 5, inplace, offset == 1,
                   device});
          }
        }
      }
    }
  }
}

void check_clusters() {
  // One cluster, of 1 to 8 blocks with 3 to 5 slots each; and several.
  const DeviceLimits one{1, 16 * 1024, 24 * 1024, true};
  const DeviceLimits long_slices{1, 36 * 1024, 40 * 1024, true};
  const DeviceLimits several{12, 16 * 1024, 24 * 1024, true};
  for (const auto order : kOrders) {
    emulation::machine().order = order;
    for (const int v : {1, 7, 64, 1031, 3072, 4100, 9001, 36000}) {
      for (const int offset : {0, 1, 6}) {
        for (const int out_offset : {-1, 7 - offset, 8 + offset}) {
          const bool inplace = out_offset < 0;
          const int out = inplace ? offset : out_offset;
          for (const DeviceLimits& device : {one, long_slices, several}) {
            const bool fits = v <= 9001 || device.shared_per_block > one.shared_per_block;
            if (!fits || (v > 9001 && order == emulation::Order::kShuffled)) continue;
            check({v > 9001 ? 5 : 9, v, offset, out, v % 5, inplace, offset == 1, device});
          }
        }
      }
    }
  }
}

// The accountant looks at 32 rows at a time, and may find none in them.
void check_masks() {
  const DeviceLimits one{1, 16 * 1024, 24 * 1024, true};
  const DeviceLimits several{12, 16 * 1024, 24 * 1024, true};
  for (const auto order : kOrders) {
    emulation::machine().order = order;
    for (const Mask mask :
         {Mask::kFourth, Mask::kNone, Mask::kAll, Mask::kAllButLast, Mask::kEdges, Mask::kRuns}) {
      for (const int v : {7, 4100}) {
        for (const int rows : {1, 2, 4, 31, 33, 97}) {
          check({rows, v, 1, 1, 0, true, false, one, mask, true});
          check({rows, v, 1, 2, 1, false, false, several, mask});
        }
      }
    }
  }
}

void check_transient() {
  const DeviceLimits device{1, 227 * 1024, 228 * 1024, true};
  for (const auto order : kOrders) {
    emulation::machine().order = order;
    // Clusters of 1, 2 and 8 blocks, slices that differ, warps with and without a segment more.
    for (const int v : {1, 7, 1031, 4100, 16385, 67000}) {
      for (const int offset : {0, 1}) {
        for (const int out_offset : {-1, 7 - offset}) {
          const bool inplace = out_offset < 0, entropy = offset == 1;
          const bool few = v > 9001 && order != emulation::Order::kForward;
          if (few && (v > 60000 || inplace)) continue;
          check({v > 9001 ? 2 : 5, v, offset, inplace ? offset : out_offset, v % 5, inplace,
                 entropy, device, Mask::kFourth, false, RowKernel::kTransient});
        }
      }
    }
    for (const Mask mask : {Mask::kAll, Mask::kAllButLast}) {
      check({3, 17000, 1, 2, 1, false, false, device, mask, true, RowKernel::kTransient});
    }
  }
}

}  // namespace
}  // namespace cfpo::cuda

// With "rows", "clusters" or "transient" as its argument, those kernels only.
int main(int n, char** arguments) {
  const std::string which = n > 1 ? arguments[1] : "";
  const auto wanted = [&](const std::string& name) { return which.empty() || which == name; };
  if (wanted("rows")) cfpo::cuda::check_rows();
  if (wanted("clusters")) {
    cfpo::cuda::check_clusters();
    cfpo::cuda::check_masks();
  }
  if (wanted("transient")) cfpo::cuda::check_transient();
  std::printf("%d cases, 0 failed\n", cfpo::cuda::count);
  return 0;
}
