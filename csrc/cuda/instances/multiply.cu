#include "cuda/run.cuh"

namespace cfpo::cuda {
template void run_multiply<float>(const Rows&, const float*, std::int64_t, const Execution&);
template void run_multiply<bfloat16>(const Rows&, const float*, std::int64_t, const Execution&);
template void run_multiply<float16>(const Rows&, const float*, std::int64_t, const Execution&);
}  // namespace cfpo::cuda
