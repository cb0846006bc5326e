// Picks the instruction-set level at run time.
#pragma once

#include <string>
#include <vector>

#include "cpu/segment_ops.h"

namespace cfpo::cpu {

std::vector<const Level*> levels_here();           // best first
const Level& find_level(const std::string& name);  // "" is the best; throws std::invalid_argument

}  // namespace cfpo::cpu
