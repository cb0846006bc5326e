#include "cuda/run.cuh"

namespace cfpo::cuda {
template void run_stage<float, LogpsBackwardStage>(const LogpsBackwardStage&, const Rows&,
                                                   const Execution&);
template void run_stage<float, Capped<LogpsBackwardStage>>(const Capped<LogpsBackwardStage>&,
                                                           const Rows&, const Execution&);
}  // namespace cfpo::cuda
