#include "cpu/isa_avx2.h"

namespace cfpo::cpu {
const Level kLevelAvx2 = make_level<Avx2>("avx2");
}  // namespace cfpo::cpu
