#include "cpu/isa_generic.h"

namespace cfpo::cpu {
const Level kLevelBaseline = make_level<Generic>("baseline");
}  // namespace cfpo::cpu
