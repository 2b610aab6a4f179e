// Residual quantization on a CUDA device, without torch: raw pointers to device memory, and a stream as void*.
#pragma once

#include <cstdint>

namespace h2rec::cuda {

enum class Dtype { kFloat32, kFloat64, kFloat16, kBFloat16 };

struct ResidualQuantizeArgs {
  const void* x;           // [num_rows, dim] in `dtype`
  const void* codebooks;   // [sum of sizes, dim], double if `dtype` is kFloat64, else float
  const std::int64_t* sizes;  // [num_levels], in device memory
  void* quantized;         // [num_rows, dim] in `dtype`
  std::int32_t* codes;     // [num_rows, num_levels]
  std::int64_t num_rows;
  std::int64_t dim;
  int num_levels;
  Dtype dtype;
  // Whether rows of x and of codebooks start at multiples of 16 bytes (of 8 for 16-bit x): they are then read four elements at a time.
  bool vectorised;
};

// Greedy search (beam size 1). Returns 0, or the cudaError_t of the launch.
int residual_quantize(const ResidualQuantizeArgs& args, void* stream);

}  // namespace h2rec::cuda
