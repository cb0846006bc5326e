#include "cpu/levels.h"

#include <stdexcept>

namespace cfpo::cpu {

std::vector<const Level*> levels_here() {
  std::vector<const Level*> levels;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) levels.push_back(&kLevelAvx512Bf16);
  if (avx512) levels.push_back(&kLevelAvx512);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    levels.push_back(&kLevelAvx2);
  }
#endif
  levels.push_back(&kLevelBaseline);
  return levels;
}

const Level& find_level(const std::string& name) {
  static const std::vector<const Level*> levels = levels_here();
  std::string known;
  for (const Level* level : levels) {
    if (name.empty() || name == level->name) return *level;
    known += known.empty() ? "" : ", ";
    known += level->name;
  }
  throw std::invalid_argument("CPU level '" + name +
                              "' cannot run here; this machine has: " + known);
}

}  // namespace cfpo::cpu
