#include "cuda/run.cuh"

namespace cfpo::cuda {
template void run_stage<bfloat16, LogpsStage>(const LogpsStage&, const Rows&, const Execution&);
template void run_stage<bfloat16, Capped<LogpsStage>>(const Capped<LogpsStage>&, const Rows&,
                                                      const Execution&);
}  // namespace cfpo::cuda
