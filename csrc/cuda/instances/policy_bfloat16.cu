#include "cuda/run.cuh"

namespace cfpo::cuda {
template void run_stage<bfloat16, PolicyStage>(const PolicyStage&, const Rows&, const Execution&);
template void run_stage<bfloat16, Capped<PolicyStage>>(const Capped<PolicyStage>&, const Rows&,
                                                       const Execution&);
}  // namespace cfpo::cuda
