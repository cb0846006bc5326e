#include "cpu/isa_avx512.h"

namespace cfpo::cpu {
const Level kLevelAvx512 = make_level<Avx512>("avx512");
}  // namespace cfpo::cpu
