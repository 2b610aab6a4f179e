// Rows of fp16, bf16, fp32 or fp64 in device memory.
#pragma once

#include <cstdint>

namespace h2rec::cuda {

enum class Dtype { kFloat32, kFloat64, kFloat16, kBFloat16 };

// [count, dim]; strides in elements. `wide`: columns follow each other, and rows are aligned to four elements.
struct Rows {
  const void* data;
  Dtype dtype;
  std::int64_t row_stride, column_stride, dim;
  bool wide;
};

inline Rows make_rows(const void* data, Dtype dtype, std::int64_t row_stride, std::int64_t column_stride, std::int64_t dim) {
  const bool is_16_bit = dtype == Dtype::kFloat16 || dtype == Dtype::kBFloat16;
  const bool wide = column_stride == 1 && row_stride % 4 == 0 &&
                    reinterpret_cast<std::uintptr_t>(data) % (is_16_bit ? 8 : 16) == 0;
  return {data, dtype, row_stride, column_stride, dim, wide};
}

}  // namespace h2rec::cuda
