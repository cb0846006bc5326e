#include "cuda/run.cuh"

namespace cfpo::cuda {
template void run_stage<float16, PolicyStage<Cfpo<double>>>(const PolicyStage<Cfpo<double>>&,
                                                            const Rows&, const Execution&);
}  // namespace cfpo::cuda
