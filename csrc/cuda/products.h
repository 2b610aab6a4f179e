// Products of 64 rows with 128 others on the tensor cores: fp16 in, fp32 out.
#pragma once

#include <cstdint>

#include "device.h"

namespace h2rec::cuda {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;
constexpr int kOperands = 64;        // rows of a tile
constexpr int kCodewords = 128;      // columns of a tile
constexpr int kDepth = 32;           // elements of a row that are in shared memory at a time; rows are padded to it
constexpr int kStageStride = kDepth + 8;        // 80 bytes: eight rows that are read together lie in different banks
constexpr int kProductStride = kCodewords + 8;  // four rows that are written together lie in different banks

constexpr int kStageHalves = (kOperands + kCodewords) * kStageStride;
// Two stages of operands, and then, in their place, the products.
constexpr int kSharedBytes = 4 * kOperands * kProductStride;
static_assert(2 * 2 * kStageHalves <= kSharedBytes && kSharedBytes <= 48 * 1024);

// [kOperands, kProductStride] fp32 in `shared` become the products of `rows` with `columns`, [*, depth] fp16 both. The other
// threads' products may be read after a barrier; before the next call there must be another.
__device__ inline void multiply(const std::uint16_t* rows, const std::uint16_t* columns, int depth, unsigned char* shared) {
  namespace wmma = nvcuda::wmma;
  constexpr int kTile = 16, kRowTiles = 2, kColumnTiles = 4;  // 32 x 64 products a warp
  auto* stages = reinterpret_cast<std::uint16_t*>(shared);
  const int warp = threadIdx.x / 32, first_row = warp % 2 * 32, first_column = warp / 2 * 64;

  const auto copy = [&](int d, std::uint16_t* stage) {
    constexpr int kPieces = kDepth / 8;  // of 16 bytes
#pragma unroll 1  // unrolled, the addresses spill
    for (int i = threadIdx.x; i < (kOperands + kCodewords) * kPieces; i += kThreads) {
      const int row = i / kPieces, piece = i % kPieces * 8;
      const bool is_operand = row < kOperands;
      const auto place = static_cast<std::int64_t>(is_operand ? row : row - kOperands) * depth + d + piece;
      __pipeline_memcpy_async(stage + row * kStageStride + piece, (is_operand ? rows : columns) + place, 16);
    }
  };

  wmma::fragment<wmma::accumulator, kTile, kTile, kTile, float> sums[kRowTiles][kColumnTiles];
#pragma unroll
  for (auto& row_of_sums : sums) {
#pragma unroll
    for (auto& sum : row_of_sums) {
      wmma::fill_fragment(sum, 0.0f);
    }
  }
  copy(0, stages);
  __pipeline_commit();
  for (int d = 0; d < depth; d += kDepth) {
    const auto* stage = reinterpret_cast<const __half*>(stages + d / kDepth % 2 * kStageHalves);
    if (d + kDepth < depth) {
      copy(d + kDepth, stages + (d / kDepth + 1) % 2 * kStageHalves);
    }
    __pipeline_commit();
    __pipeline_wait_prior(1);  // all but the copy that was just issued
    __syncthreads();           // everybody's part of this stage is there
#pragma unroll
    for (int k = 0; k < kDepth; k += kTile) {
      wmma::fragment<wmma::matrix_a, kTile, kTile, kTile, __half, wmma::row_major> a[kRowTiles];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        wmma::load_matrix_sync(a[i], stage + (first_row + i * kTile) * kStageStride + k, kStageStride);
      }
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
        wmma::fragment<wmma::matrix_b, kTile, kTile, kTile, __half, wmma::col_major> b;
        wmma::load_matrix_sync(b, stage + (kOperands + first_column + j * kTile) * kStageStride + k, kStageStride);
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          wmma::mma_sync(sums[i][j], a[i], b, sums[i][j]);
        }
      }
    }
    __syncthreads();  // everybody is done with this stage
  }
  auto* products = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
      wmma::store_matrix_sync(products + (first_row + i * kTile) * kProductStride + first_column + j * kTile, sums[i][j],
                              kProductStride, wmma::mem_row_major);
    }
  }
}

}  // namespace h2rec::cuda
