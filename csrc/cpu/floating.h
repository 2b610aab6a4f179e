// The floating-point types of tensors.
#pragma once

#include <cstdint>

namespace h2rec {

enum class FloatType { kFloat32, kFloat64, kBFloat16, kFloat16 };

struct BFloat16 {
  std::uint16_t bits;
};

struct Half {
  std::uint16_t bits;
};

}  // namespace h2rec
