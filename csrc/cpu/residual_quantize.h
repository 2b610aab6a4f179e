// All levels of nearest codeword and residual, one tile of vectors at a time. README.md has the derivation and the floor.
#pragma once

#include <cstdint>

#include "floating.h"
#include "parallel.h"

namespace h2rec {

// [rows, dim]; strides in elements.
struct Vectors {
  const void* data;
  FloatType type;
  std::int64_t rows, dim;
  std::int64_t row_stride, column_stride;
};

// The rows of all levels, contiguous. T, float or double, is what the arithmetic is done in.
template <typename T>
struct Codebooks {
  const T* data;              // [sum of sizes, dim]
  const std::int64_t* sizes;  // [levels], each at least 1
  std::int64_t levels;
};

struct QuantizedVectors {
  void* vectors;        // [rows, dim], contiguous, of the vectors' type
  std::int32_t* codes;  // [rows, levels], contiguous
};

template <typename T>
void residual_quantize(const Vectors& x, const Codebooks<T>& codebooks, std::int64_t beam_size,
                       const QuantizedVectors& out, ParallelFor parallel_for);

}  // namespace h2rec
