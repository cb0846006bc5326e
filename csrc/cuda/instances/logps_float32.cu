#include "cuda/run.cuh"

namespace cfpo::cuda {
template void run_stage<float, LogpsStage>(const LogpsStage&, const Rows&, const Execution&);
template void run_stage<float, Capped<LogpsStage>>(const Capped<LogpsStage>&, const Rows&,
                                                   const Execution&);
}  // namespace cfpo::cuda
