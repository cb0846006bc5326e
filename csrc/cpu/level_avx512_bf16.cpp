#include "cpu/isa_avx512.h"

namespace cfpo::cpu {
const Level kLevelAvx512Bf16 = make_level<Avx512>("avx512_bf16");
}  // namespace cfpo::cpu
