#include "cuda/run.cuh"

namespace cfpo::cuda {
template void run_stage<float, PolicyStage<PpoClip<double>>>(const PolicyStage<PpoClip<double>>&,
                                                             const Rows&, const Execution&);
}  // namespace cfpo::cuda
