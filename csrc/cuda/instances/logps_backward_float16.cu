#include "cuda/run.cuh"

namespace cfpo::cuda {
template void run_stage<float16, LogpsBackwardStage>(const LogpsBackwardStage&, const Rows&,
                                                     const Execution&);
template void run_stage<float16, Capped<LogpsBackwardStage>>(const Capped<LogpsBackwardStage>&,
                                                             const Rows&, const Execution&);
}  // namespace cfpo::cuda
