// Storage types of the logits. Arithmetic is always float32; these only carry bits.
#pragma once

#include <cstdint>

#include "core/host_device.h"

namespace cfpo {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct bfloat16 {
  std::uint16_t bits;
};
struct float16 {
  std::uint16_t bits;
};

CFPO_HOST_DEVICE inline std::int64_t dtype_size(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : 2;
}

}  // namespace cfpo
