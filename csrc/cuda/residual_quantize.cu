// r_0 = x; level l chooses k_l = argmin_k |r_l - c_{l,k}|^2, the lowest index on a tie, and leaves r_{l+1} = r_l - c_{l,k_l}.
//
// A block owns kRows rows through all levels; nothing of size N x K exists anywhere. Distances are direct sums of squares in the
// compute type, so a tie of equal codewords is a tie in arithmetic, and no cancellation blurs near ones. The residual is not
// stored: it is formed again from x and the chosen codewords, always in the order of the levels, when a piece of it is needed.
// So shared memory does not grow with D, K or L, and no workspace is needed.
#include "residual_quantize.h"

#include <cmath>

#include "device.h"

namespace h2rec::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;
constexpr int kRowsPerWarp = 8;
constexpr int kRows = kWarps * kRowsPerWarp;
constexpr int kCodewordsPerLane = 4;
constexpr int kCodewords = 32 * kCodewordsPerLane;  // of one tile
constexpr int kDepth = 16;                          // elements of a row that are in shared memory at a time
constexpr int kStride = kDepth + 4;                 // lanes then read their codewords 16 bytes wide without bank conflicts
constexpr unsigned kAllLanes = 0xffffffffu;

template <typename C>
constexpr int kSharedBytes = static_cast<int>(sizeof(C)) * (kRows + kCodewords) * kStride;
static_assert(kSharedBytes<double> <= 48 * 1024, "what a block has on every device without asking for more");

template <typename C>
struct alignas(16) Four {
  C at[4];
};

// 16-byte loads: the compiler does not join scalar ones, for it does not know that they are aligned.
__device__ inline Four<float> load_aligned(const float* p) {
  const float4 v = *reinterpret_cast<const float4*>(p);
  return {{v.x, v.y, v.z, v.w}};
}
__device__ inline Four<double> load_aligned(const double* p) {
  const double2 low = *reinterpret_cast<const double2*>(p), high = *reinterpret_cast<const double2*>(p + 2);
  return {{low.x, low.y, high.x, high.y}};
}
template <typename C>
__device__ inline void store_aligned(C* p, const Four<C>& v) {
  *reinterpret_cast<Four<C>*>(p) = v;
}

// Elements [d, d + 4) of a row that has `dim`; zeros beyond, which add nothing to a distance.
template <typename C>
__device__ inline Four<C> load4(const C* row, std::int64_t d, std::int64_t dim, bool vectorised) {
  if (vectorised && d + 4 <= dim) {
    return load_aligned(row + d);
  }
  Four<C> v;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v.at[i] = d + i < dim ? row[d + i] : C(0);
  }
  return v;
}

// bf16 and fp16 by their bits. A subnormal or normal half, moved to the place of a float's fields, is short of 2^112.
__device__ inline float from_bits(std::uint16_t bits, Dtype dtype) {
  const unsigned sign = static_cast<unsigned>(bits & 0x8000u) << 16;
  if (dtype == Dtype::kBFloat16) {
    return __uint_as_float(static_cast<unsigned>(bits) << 16);
  }
  const unsigned magnitude = static_cast<unsigned>(bits & 0x7fffu) << 13;
  if (magnitude >= 0x0f800000u) {  // infinity or NaN
    return __uint_as_float(sign | 0x7f800000u | (magnitude & 0x007fe000u));
  }
  return __uint_as_float(sign | __float_as_uint(__uint_as_float(magnitude) * 0x1p112f));
}

// To nearest, ties to even.
__device__ inline std::uint16_t to_bits(float value, Dtype dtype) {
  const unsigned all = __float_as_uint(value), magnitude = all & 0x7fffffffu;
  const auto sign = static_cast<unsigned>(all >> 16 & 0x8000u);
  if (dtype == Dtype::kBFloat16) {
    return magnitude > 0x7f800000u ? 0x7fffu : static_cast<std::uint16_t>((all + 0x7fffu + (all >> 16 & 1u)) >> 16);
  }
  if (magnitude > 0x7f800000u) {
    return 0x7fffu;
  }
  if (magnitude >= 0x477ff000u) {  // rounds to 65536 or more
    return static_cast<std::uint16_t>(sign | 0x7c00u);
  }
  if (magnitude < 0x38800000u) {  // subnormal: the addition of 0.5 rounds at 2^-24, the smallest half
    return static_cast<std::uint16_t>(sign | (__float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u));
  }
  return static_cast<std::uint16_t>(sign | ((magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13));
}

__device__ inline Four<float> load_x(const ResidualQuantizeArgs& args, std::int64_t row, std::int64_t d, float) {
  if (args.dtype == Dtype::kFloat32) {
    return load4(static_cast<const float*>(args.x) + row * args.dim, d, args.dim, args.vectorised);
  }
  const auto* p = static_cast<const std::uint16_t*>(args.x) + row * args.dim + d;
  Four<float> v;
  if (args.vectorised && d + 4 <= args.dim) {
    const uint2 pairs = *reinterpret_cast<const uint2*>(p);
    v.at[0] = from_bits(static_cast<std::uint16_t>(pairs.x), args.dtype);
    v.at[1] = from_bits(static_cast<std::uint16_t>(pairs.x >> 16), args.dtype);
    v.at[2] = from_bits(static_cast<std::uint16_t>(pairs.y), args.dtype);
    v.at[3] = from_bits(static_cast<std::uint16_t>(pairs.y >> 16), args.dtype);
    return v;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v.at[i] = d + i < args.dim ? from_bits(p[i], args.dtype) : 0.0f;
  }
  return v;
}
__device__ inline Four<double> load_x(const ResidualQuantizeArgs& args, std::int64_t row, std::int64_t d, double) {
  return load4(static_cast<const double*>(args.x) + row * args.dim, d, args.dim, args.vectorised);
}

// Elements [d, d + 4) of the residual of `row` after `level` levels.
template <typename C>
__device__ Four<C> residual4(const ResidualQuantizeArgs& args, std::int64_t row, int level, std::int64_t d) {
  Four<C> r = load_x(args, row, d, C());
  const C* codebook = static_cast<const C*>(args.codebooks);
  for (int l = 0; l < level; ++l) {
    const std::int64_t code = args.codes[row * args.num_levels + l];
    const Four<C> c = load4(codebook + code * args.dim, d, args.dim, args.vectorised);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      r.at[i] -= c.at[i];
    }
    codebook += args.sizes[l] * args.dim;
  }
  return r;
}

template <typename C>
struct Best {
  C distance;
  int code;

  __device__ void offer(C other, int other_code) {
    if (other < distance || (other == distance && other_code < code)) {
      distance = other;
      code = other_code;
    }
  }
};

template <typename C>
__device__ void write_sum(const ResidualQuantizeArgs& args, std::int64_t row, int lane) {
  bool finite = true;
  for (std::int64_t d = 4 * lane; d < args.dim; d += 4 * 32) {
    const Four<C> v = load_x(args, row, d, C());
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      finite = finite && v.at[i] - v.at[i] == C(0);
    }
  }
  finite = __all_sync(kAllLanes, finite);
  for (std::int64_t d = lane; d < args.dim; d += 32) {
    const C* codebook = static_cast<const C*>(args.codebooks);
    C sum = finite ? C(0) : C(NAN);  // what nobody checked shows
    for (int l = 0; l < args.num_levels; ++l) {
      sum += codebook[args.codes[row * args.num_levels + l] * args.dim + d];
      codebook += args.sizes[l] * args.dim;
    }
    const std::int64_t place = row * args.dim + d;
    if (args.dtype == Dtype::kFloat64) {
      static_cast<double*>(args.quantized)[place] = sum;
    } else if (args.dtype == Dtype::kFloat32) {
      static_cast<float*>(args.quantized)[place] = static_cast<float>(sum);
    } else {
      static_cast<std::uint16_t*>(args.quantized)[place] = to_bits(static_cast<float>(sum), args.dtype);
    }
  }
}

template <typename C>
__global__ void __launch_bounds__(kThreads) residual_quantize_kernel(const ResidualQuantizeArgs args) {
  H2REC_SHARED(shared);
  C* rows = reinterpret_cast<C*>(shared);       // [kRows, kStride]
  C* codewords = rows + kRows * kStride;        // [kCodewords, kStride]
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const std::int64_t first_row = static_cast<std::int64_t>(blockIdx.x) * kRows;

  const C* codebook = static_cast<const C*>(args.codebooks);
  for (int level = 0; level < args.num_levels; ++level) {
    const int size = static_cast<int>(args.sizes[level]);
    Best<C> best[kRowsPerWarp];
#pragma unroll
    for (int q = 0; q < kRowsPerWarp; ++q) {
      best[q] = {C(INFINITY), size};
    }
    for (int first = 0; first < size; first += kCodewords) {
      C distance[kRowsPerWarp][kCodewordsPerLane] = {};
      for (std::int64_t depth = 0; depth < args.dim; depth += kDepth) {
        __syncthreads();  // everybody is done with the last piece, and has written the codes of the last level
        for (int i = threadIdx.x; i < kRows * (kDepth / 4); i += kThreads) {
          const int row = i / (kDepth / 4), d = i % (kDepth / 4) * 4;
          Four<C> v = {};
          if (first_row + row < args.num_rows) {
            v = residual4<C>(args, first_row + row, level, depth + d);
          }
          store_aligned(rows + row * kStride + d, v);
        }
        for (int i = threadIdx.x; i < kCodewords * (kDepth / 4); i += kThreads) {
          const int k = i / (kDepth / 4), d = i % (kDepth / 4) * 4;
          Four<C> v = {};
          if (first + k < size) {
            v = load4(codebook + (first + k) * args.dim, depth + d, args.dim, args.vectorised);
          }
          store_aligned(codewords + k * kStride + d, v);
        }
        __syncthreads();  // the piece is there
#pragma unroll 1  // unrolled, it spills on sm_100
        for (int d = 0; d < kDepth; d += 4) {
          Four<C> c[kCodewordsPerLane];
#pragma unroll
          for (int j = 0; j < kCodewordsPerLane; ++j) {
            c[j] = load_aligned(codewords + (j * 32 + lane) * kStride + d);
          }
#pragma unroll
          for (int q = 0; q < kRowsPerWarp; ++q) {
            const Four<C> r = load_aligned(rows + (warp * kRowsPerWarp + q) * kStride + d);
#pragma unroll
            for (int j = 0; j < kCodewordsPerLane; ++j) {
#pragma unroll
              for (int i = 0; i < 4; ++i) {
                const C difference = r.at[i] - c[j].at[i];
                distance[q][j] += difference * difference;
              }
            }
          }
        }
      }
#pragma unroll
      for (int j = 0; j < kCodewordsPerLane; ++j) {
        const int k = first + j * 32 + lane;
        if (k < size) {
#pragma unroll
          for (int q = 0; q < kRowsPerWarp; ++q) {
            best[q].offer(distance[q][j], k);
          }
        }
      }
    }
#pragma unroll
    for (int q = 0; q < kRowsPerWarp; ++q) {
#pragma unroll
      for (int step = 16; step > 0; step /= 2) {
        const C other = __shfl_xor_sync(kAllLanes, best[q].distance, step);
        const int code = __shfl_xor_sync(kAllLanes, best[q].code, step);
        best[q].offer(other, code);
      }
      const std::int64_t row = first_row + warp * kRowsPerWarp + q;
      if (lane == 0 && row < args.num_rows) {
        // Nothing is nearest to a row of NaN, and codes stay in range.
        args.codes[row * args.num_levels + level] = best[q].code < size ? best[q].code : 0;
      }
    }
    codebook += size * args.dim;
  }
  __syncwarp();  // a warp reads the codes that its first lane wrote
  for (int q = 0; q < kRowsPerWarp; ++q) {
    const std::int64_t row = first_row + warp * kRowsPerWarp + q;
    if (row < args.num_rows) {
      write_sum<C>(args, row, lane);
    }
  }
}

}  // namespace

int residual_quantize(const ResidualQuantizeArgs& args, void* stream) {
  if (args.num_rows == 0) {
    return 0;
  }
  const dim3 grid(static_cast<unsigned>((args.num_rows + kRows - 1) / kRows));
  if (args.dtype == Dtype::kFloat64) {
    return H2REC_LAUNCH(residual_quantize_kernel<double>, grid, kThreads, kSharedBytes<double>, stream, args);
  }
  return H2REC_LAUNCH(residual_quantize_kernel<float>, grid, kThreads, kSharedBytes<float>, stream, args);
}

}  // namespace h2rec::cuda
