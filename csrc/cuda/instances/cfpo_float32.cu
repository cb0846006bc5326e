#include "cuda/run.cuh"

namespace cfpo::cuda {
template void run_stage<float, PolicyStage<Cfpo<double>>>(const PolicyStage<Cfpo<double>>&,
                                                          const Rows&, const Execution&);
}  // namespace cfpo::cuda
