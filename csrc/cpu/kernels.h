// The CPU kernels' entry points. Each returns when its outputs are written.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/params.h"

namespace cfpo::cpu {

// How a call runs: `level` names an instruction set or is empty for the best one here.
struct Execution {
  int threads;
  std::string level;
};

// Instruction-set levels that this machine can run, best first.
std::vector<std::string> supported_levels();

void policy_loss(const PolicyLossParams& params, const Execution& execution);
void token_losses(const TokenLossParams& params, const Execution& execution);
void token_logps(const TokenLogpsParams& params, const Execution& execution);
void token_logps_backward(const TokenLogpsBackwardParams& params, const Execution& execution);

// rows[i, :] *= factors[i * factor_stride]; rows with factor 1 are not touched.
void multiply_rows(const Rows& rows, const float* factors, std::int64_t factor_stride,
                   const Execution& execution);

}  // namespace cfpo::cpu
