// Residual quantization on a CUDA device, without torch: raw pointers to device memory, and a stream as void*.
// csrc/README.md has the algorithm, its error bound and its costs.
#pragma once

#include <cstdint>

#include "rows.h"

namespace h2rec::cuda {

struct ResidualQuantizeArgs {
  Rows x;
  std::int64_t num_rows;
  const void* codebooks;      // [sum of sizes, dim], contiguous, in `compute`
  const std::int64_t* sizes;  // [num_levels], in host memory
  int num_levels;
  Dtype compute;              // kFloat32 or kFloat64
  void* quantized;            // [num_rows, dim], contiguous, in the dtype of x
  std::int32_t* codes;        // [num_rows, num_levels], contiguous
};

// Paths that a row can keep, one in each lane of a warp.
constexpr int kMaxBeamSize = 32;

struct ResidualQuantizePlan {
  int beam_size;  // paths that are kept before the last level, which leaves one
  // Whether levels meet through tables of products of their codewords; else the residual is formed at every level.
  bool tables;
  int capacity;   // candidates of a row; when there are more, all are decided on
  int num_blocks;
};

// For the current device, by counts of bytes and operations. `beam_size` is at most kMaxBeamSize.
ResidualQuantizePlan plan_residual_quantize(const ResidualQuantizeArgs& args, int beam_size);

// Does not grow with num_rows beyond what the blocks of the plan need.
std::int64_t workspace_bytes(const ResidualQuantizeArgs& args, const ResidualQuantizePlan& plan);

// `workspace` is device memory, aligned to 256 bytes. Returns 0, or the cudaError_t of a launch.
int residual_quantize(const ResidualQuantizeArgs& args, const ResidualQuantizePlan& plan, void* workspace, void* stream);

}  // namespace h2rec::cuda
