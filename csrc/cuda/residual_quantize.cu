// r_0 = x; level l chooses k_l = argmin_k |r_l - c_{l,k}|^2, the lowest index on a tie, and leaves r_{l+1} = r_l - c_{l,k_l}.
// A beam keeps the paths of codes with the lowest |x - sum of their codewords|^2: ties go to the earlier parent, then to the lower
// code.
//
// A block takes 64 rows at a time through all levels; nothing of size N x K exists anywhere. Tensor cores multiply the residuals
// (or x, see `Search::tables`) with tiles of 128 codewords, in fp16. From a product and a proven bound of its error follow a lower
// and an upper bound of a distance. A codeword whose lower bound is above the lowest upper bound cannot win; the few others are
// candidates, and what is decided on is the direct sum of squares in C, fp32 or fp64. A row with more candidates than there is
// room for is decided on all codewords: the codes never depend on the products.
#include "residual_quantize.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "load_store.h"
#include "products.h"
#include "warp.h"

namespace h2rec::cuda {
namespace {

struct Level {
  std::int64_t first;         // codeword, of all levels'
  std::int64_t padded_first;  // the same where every level is padded to whole tiles
  std::int64_t table;         // place in Search::tables
  int size, padded;
};

// How far a distance that was computed from an fp16 product may be from the one that is decided on; csrc/README.md derives it.
struct ErrorBound {
  float product;    // times |row| |codeword|
  float underflow;  // times the row's scale and |codeword|
  float rounding;   // times (|x| + sum of the codewords' norms)^2
  float smallest;
  float up;         // the root of a sum of squares times this, plus `lost`, is not below the norm
  float lost;       // what squares that underflow may have been
};

struct alignas(16) Path {  // read as one
  float distance;  // |x - sum of its codewords|^2; of no account while a row has one path
  float reach;     // at least |x| + the sum of its codewords' norms, and so at least the norm of its residual
  float norm;      // of what the codewords are multiplied with
  float scale;     // a power of two above it
};

struct Search {
  Rows x;
  std::int64_t num_rows;
  const void* codebooks;
  bool wide_codebooks;
  int num_levels;
  void* quantized;
  std::int32_t* codes;

  ResidualQuantizePlan plan;
  ErrorBound bound;
  int depth;      // dim, padded to whole stages
  int tile_rows, num_tiles;  // a block works on one tile at a time
  Level* levels;
  // Of all levels, each padded with zeros to whole tiles.
  std::uint16_t* codewords;  // [*, depth] fp16, of norm at most 1
  float* squares;            // |c|^2
  float* scales;             // -2 times what was divided by
  float* norms;              // at least |c|; infinite where it is too large
  // Of level l [all codewords before it, padded]: 2 <c_{j,k'}, c_{l,k}>. With them x is multiplied at every level and no residual
  // is formed: |x - s - c|^2 = |x - s|^2 + |c|^2 - 2 <x, c> + 2 <s, c>, for the sum s of a path's codewords. Null without.
  float* tables;

  // What a block needs for its rows.
  std::uint16_t* operands;    // [blocks, kOperands, depth] fp16
  std::int32_t* path_codes;   // [blocks, 2, tile_rows, beam, num_levels]; levels alternate between the two
  Path* paths;                // [blocks, tile_rows, beam]
  float* upper_bounds;        // [blocks, tile_rows, beam], the lowest, ascending
  std::int32_t* counts;       // [blocks, tile_rows], of candidates, also of those that found no room
  std::int32_t* candidates;   // [blocks, tile_rows, capacity]: path * size of the level + codeword
  float* lower_bounds;        // [blocks, tile_rows, capacity]
};

// Up to here squares and products of norms, and sums of a few of them, stay finite.
constexpr float kLargestNorm = 0x1p62f;

template <typename C>
constexpr Dtype kDtype = sizeof(C) == 8 ? Dtype::kFloat64 : Dtype::kFloat32;

template <typename C>
__device__ inline Rows codebook_rows(const Search& s) {
  return {s.codebooks, kDtype<C>, s.x.dim, 1, s.x.dim, s.wide_codebooks};
}

__device__ inline Four<float> load_aligned(const float* p) {
  const float4 v = *reinterpret_cast<const float4*>(p);
  return {{v.x, v.y, v.z, v.w}};
}

// A power of two above the norm, neither so large nor so small that dividing by it goes wrong.
__device__ inline float scale_above(float norm) {
  if (!(norm < 0x1p126f)) {
    return 0x1p127f;
  }
  return norm < 0x1p-100f ? 0x1p-99f : __uint_as_float((__float_as_uint(norm) & 0x7f800000u) + 0x00800000u);
}

template <typename C>
__device__ inline C square_of(const Four<C>& v) {
  return v.at[0] * v.at[0] + v.at[1] * v.at[1] + (v.at[2] * v.at[2] + v.at[3] * v.at[3]);
}

template <typename C>
__device__ inline void store_halves(std::uint16_t* p, const Four<C>& v, float factor) {
  const auto half = [&](int i) { return static_cast<unsigned>(to_bits(static_cast<float>(v.at[i]) * factor, Dtype::kFloat16)); };
  *reinterpret_cast<uint2*>(p) = {half(0) | half(1) << 16, half(2) | half(3) << 16};
}

// |row|^2, by all lanes.
template <typename C>
__device__ float square_norm(const Rows& rows, std::int64_t row, int lane) {
  C sum = 0;
  for (std::int64_t d = 4 * lane; d < rows.dim; d += 4 * kWarpSize) {
    sum += square_of(load4<C>(rows, row, d));
  }
  return static_cast<float>(warp_sum(sum));
}

// ---- before the search: codewords in fp16, and products of codewords

// A warp for each codeword of the padded level.
template <typename C>
__global__ void __launch_bounds__(kThreads) prepare_level_kernel(const Search s, int number, const Level level) {
  const int lane = threadIdx.x % kWarpSize, k = blockIdx.x * kWarps + threadIdx.x / kWarpSize;
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    s.levels[number] = level;
  }
  const Rows rows = codebook_rows<C>(s);
  const bool exists = k < level.size;
  const float square = exists ? square_norm<C>(rows, level.first + k, lane) : 0.0f;
  const float norm = sqrtf(square) * s.bound.up + s.bound.lost, scale = scale_above(norm);
  const std::int64_t place = level.padded_first + k;
  if (lane == 0) {
    s.squares[place] = square;
    s.scales[place] = -2 * scale;
    s.norms[place] = norm < kLargestNorm ? norm : INFINITY;  // so that its error has no bound
  }
  for (int d = 4 * lane; d < s.depth; d += 4 * kWarpSize) {
    const Four<C> v = exists ? load4<C>(rows, level.first + k, d) : Four<C>{};
    store_halves(s.codewords + place * s.depth + d, v, 1 / scale);
  }
}

constexpr int kTableRowsPerWarp = 8, kTableRows = kWarps * kTableRowsPerWarp, kTableDepth = 16;
constexpr int kTableStride = kTableDepth + 4;
template <typename C>
constexpr int kTableSharedBytes = static_cast<int>(sizeof(C)) * (kTableRows + kCodewords) * kTableStride;

template <typename C>
__device__ inline void store4(C* p, const Four<C>& v) {
  *reinterpret_cast<Four<C>*>(p) = v;
}
template <typename C>
__device__ inline Four<C> read4(const C* p) {
  return *reinterpret_cast<const Four<C>*>(p);
}

// 32 codewords of the levels before, and 128 of this one: a lane multiplies 8 with 4.
template <typename C>
__global__ void __launch_bounds__(kThreads) table_kernel(const Search s, const Level level) {
  constexpr int kPerLane = kCodewords / kWarpSize, kPieces = kTableDepth / 4;
  H2REC_SHARED(shared);
  C* earlier = reinterpret_cast<C*>(shared);          // [kTableRows, kTableStride]
  C* later = earlier + kTableRows * kTableStride;     // [kCodewords, kTableStride]
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const std::int64_t first_row = static_cast<std::int64_t>(blockIdx.y) * kTableRows;
  const int first_column = blockIdx.x * kCodewords;
  const Rows rows = codebook_rows<C>(s);
  C products[kTableRowsPerWarp][kPerLane] = {};
  for (int depth = 0; depth < s.depth; depth += kTableDepth) {
    __syncthreads();  // everybody is done with the last piece
    for (int i = threadIdx.x; i < (kTableRows + kCodewords) * kPieces; i += kThreads) {
      const int row = i / kPieces, d = i % kPieces * 4, column = first_column + row - kTableRows;
      Four<C> v = {};
      if (row < kTableRows ? first_row + row < level.first : column < level.size) {
        v = load4<C>(rows, row < kTableRows ? first_row + row : level.first + column, depth + d);
      }
      store4(earlier + row * kTableStride + d, v);
    }
    __syncthreads();  // the piece is there
#pragma unroll 1
    for (int d = 0; d < kTableDepth; d += 4) {
      Four<C> b[kPerLane];
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        b[j] = read4(later + (j * kWarpSize + lane) * kTableStride + d);
      }
#pragma unroll
      for (int q = 0; q < kTableRowsPerWarp; ++q) {
        const Four<C> a = read4(earlier + (warp * kTableRowsPerWarp + q) * kTableStride + d);
#pragma unroll
        for (int j = 0; j < kPerLane; ++j) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            products[q][j] += a.at[i] * b[j].at[i];
          }
        }
      }
    }
  }
#pragma unroll
  for (int q = 0; q < kTableRowsPerWarp; ++q) {
    const std::int64_t row = first_row + warp * kTableRowsPerWarp + q;
    if (row < level.first) {
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        s.tables[level.table + row * level.padded + first_column + j * kWarpSize + lane] =
            static_cast<float>(2 * products[q][j]);
      }
    }
  }
}

// ---- the search

// One row of a tile: what its warp reads and writes.
struct Row {
  std::int64_t row;  // of x
  std::int64_t place;  // among the rows of all blocks
  int index;         // in the tile
  int lane;
};

__device__ inline std::int32_t* codes_of(const Search& s, const Row& row, int level, int path) {
  const std::int64_t block = static_cast<std::int64_t>(blockIdx.x) * 2 + level % 2;
  return s.path_codes + ((block * s.tile_rows + row.index) * s.plan.beam_size + path) * s.num_levels;
}

__device__ inline Path* paths_of(const Search& s, const Row& row) { return s.paths + row.place * s.plan.beam_size; }

__device__ inline std::uint16_t* operands_of(const Search& s) {
  return s.operands + static_cast<std::int64_t>(blockIdx.x) * kOperands * s.depth;
}

__device__ inline int operand_index(const Search& s, const Row& row, int path) {
  return s.tables != nullptr ? row.index : row.index * s.plan.beam_size + path;
}

// Elements [d, d + 4) of what the first `level` codes leave of a row, formed in the order of the levels.
template <typename C>
__device__ Four<C> residual4(const Search& s, const Row& row, const std::int32_t* codes, int level, std::int64_t d) {
  Four<C> r = load4<C>(s.x, row.row, d);
  for (int l = 0; l < level; ++l) {
    const Four<C> c = load4<C>(codebook_rows<C>(s), s.levels[l].first + codes[l], d);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      r.at[i] -= c.at[i];
    }
  }
  return r;
}

// What is decided on: the same bits in every lane, whoever asks.
template <typename C>
__device__ C distance(const Search& s, const Row& row, const std::int32_t* codes, int level, std::int64_t codeword) {
  C sum = 0;
  for (std::int64_t d = 4 * row.lane; d < s.x.dim; d += 4 * kWarpSize) {
    Four<C> r = residual4<C>(s, row, codes, level, d);
    const Four<C> c = load4<C>(codebook_rows<C>(s), codeword, d);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      r.at[i] -= c.at[i];
    }
    sum += square_of(r);
  }
  return warp_sum(sum);
}

template <typename C>
__device__ void start(const Search& s, const Row& row) {
  const float norm = sqrtf(square_norm<C>(s.x, row.row, row.lane)) * s.bound.up + s.bound.lost;
  if (row.lane == 0) {
    paths_of(s, row)[0] = {0, norm, norm, 0};
  }
  __syncwarp();  // the path is there
}

// The residual of a path, or x, in fp16.
template <typename C>
__device__ void form_operand(const Search& s, const Row& row, int level, int path) {
  Path* const p = paths_of(s, row) + path;
  const std::int32_t* codes = codes_of(s, row, level, path);
  std::uint16_t* operand = operands_of(s) + static_cast<std::int64_t>(operand_index(s, row, path)) * s.depth;
  const float scale = scale_above(p->reach);
  C sum = 0;
  for (int d = 4 * row.lane; d < s.depth; d += 4 * kWarpSize) {
    const Four<C> r = residual4<C>(s, row, codes, level, d);
    sum += square_of(r);
    store_halves(operand + d, r, 1 / scale);
  }
  const float norm = sqrtf(static_cast<float>(warp_sum(sum))) * s.bound.up + s.bound.lost;
  if (row.lane == 0) {
    p->norm = norm;
    p->scale = scale;
  }
}

// Four codewords of a tile, the lane's own.
struct Codewords {
  int first;
  Four<float> squares, scales, norms;
};

__device__ inline Codewords load_codewords(const Search& s, const Level& info, int first) {
  const std::int64_t place = info.padded_first + first;
  return {first, load_aligned(s.squares + place), load_aligned(s.scales + place), load_aligned(s.norms + place)};
}

// Adds the candidates among the extensions of a row's paths by a tile of codewords.
__device__ void scan(const Search& s, const Row& row, int level, const Level& info, int num_paths, int keep,
                     const Codewords& codewords, const float* products) {
  const int k = codewords.first;
  float* const upper_bounds = s.upper_bounds + row.place * s.plan.beam_size;
  SortedLanes<float> lowest;
  if (row.lane < keep) {
    lowest.key = upper_bounds[row.lane];
  }
  float limit = __shfl_sync(kAllLanes, lowest.key, keep - 1);  // `keep` extensions are not above it
  int count = s.counts[row.place];
  for (int p = 0; p < num_paths; ++p) {
    const Path path = paths_of(s, row)[p];
    const Four<float> dot = load_aligned(products + operand_index(s, row, p) * kProductStride + 4 * row.lane);
    Four<float> upon = {};
    if (s.tables != nullptr) {
      const std::int32_t* codes = codes_of(s, row, level, p);
      for (int l = 0; l < level; ++l) {
        const Four<float> table =
            load_aligned(s.tables + info.table + (s.levels[l].first + codes[l]) * info.padded + k);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          upon.at[i] += table.at[i];
        }
      }
    }
    const float slope = s.bound.product * path.norm + s.bound.underflow * path.scale + 2 * s.bound.rounding * path.reach;
    const float offset =
        path.reach < kLargestNorm ? s.bound.rounding * path.reach * path.reach + s.bound.smallest : INFINITY;
    float lower[4], upper[4], lowest_of_lane = INFINITY;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float square = codewords.squares.at[i], scale = codewords.scales.at[i] * path.scale;
      const float value = square + path.distance + scale * dot.at[i] + upon.at[i];
      const float error = slope * codewords.norms.at[i] + s.bound.rounding * square + offset;
      lower[i] = value - error;
      upper[i] = k + i < info.size ? value + error : INFINITY;
      lowest_of_lane = upper[i] < lowest_of_lane ? upper[i] : lowest_of_lane;
    }
    if (keep == 1) {
      lowest_of_lane = warp_min(lowest_of_lane);
      limit = lowest_of_lane < limit ? lowest_of_lane : limit;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        while (const unsigned below = __ballot_sync(kAllLanes, upper[i] < limit)) {
          const int from = __ffs(static_cast<int>(below)) - 1;
          lowest.offer(__shfl_sync(kAllLanes, upper[i], from), 0, row.lane);
          limit = __shfl_sync(kAllLanes, lowest.key, keep - 1);
          upper[i] = row.lane == from ? INFINITY : upper[i];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool may_win = k + i < info.size && !(lower[i] > limit);  // NaN may
      const unsigned all = __ballot_sync(kAllLanes, may_win);
      const int place = count + __popc(all & ((1u << row.lane) - 1));
      if (may_win && place < s.plan.capacity) {
        s.candidates[row.place * s.plan.capacity + place] = p * info.size + k + i;
        s.lower_bounds[row.place * s.plan.capacity + place] = lower[i];
      }
      count += __popc(all);
    }
  }
  if (keep == 1) {
    lowest.key = limit;
  }
  __syncwarp();  // everybody has read the count
  if (row.lane < keep) {
    upper_bounds[row.lane] = lowest.key;
  }
  if (row.lane == 0) {
    s.counts[row.place] = count;
  }
}

// The `keep` nearest extensions of a row's paths become its paths.
template <typename C>
__device__ void decide(const Search& s, const Row& row, int level, const Level& info, int num_paths, int keep) {
  const float limit = s.upper_bounds[row.place * s.plan.beam_size + keep - 1];
  const int count = s.counts[row.place];
  const bool no_room = count > s.plan.capacity;
  const int total = no_room ? num_paths * info.size : count;
  SortedLanes<C> nearest;  // if nothing is, as for a row of NaN, the first codeword is taken
  for (int start = 0; start < total; start += kWarpSize) {
    int extension = start + row.lane;
    bool may_win = extension < total;
    if (may_win && !no_room) {
      const std::int64_t place = row.place * s.plan.capacity + extension;
      extension = s.candidates[place];
      may_win = !(s.lower_bounds[place] > limit);
    }
    unsigned left = __ballot_sync(kAllLanes, may_win);
    if (keep == 1 && total <= kWarpSize && __popc(left) == 1) {  // nothing to decide
      nearest.index = __shfl_sync(kAllLanes, extension, __ffs(static_cast<int>(left)) - 1);
      nearest.key = 0;
      break;
    }
    for (; left != 0; left &= left - 1) {
      const int next = __shfl_sync(kAllLanes, extension, __ffs(static_cast<int>(left)) - 1);
      const std::int32_t* codes = codes_of(s, row, level, next / info.size);
      nearest.offer(distance<C>(s, row, codes, level, info.first + next % info.size), next, row.lane);
    }
  }
  const int parent = nearest.index / info.size, code = nearest.index % info.size;
  Path path = paths_of(s, row)[parent];
  path.distance = static_cast<float>(nearest.key);
  path.reach = (path.reach + s.norms[info.padded_first + code]) * s.bound.up;
  __syncwarp();  // the paths are read: they may be replaced
  if (row.lane < keep) {
    paths_of(s, row)[row.lane] = path;
    const std::int32_t* before = codes_of(s, row, level, parent);
    std::int32_t* after = codes_of(s, row, level + 1, row.lane);
    for (int l = 0; l < level; ++l) {
      after[l] = before[l];
    }
    after[level] = code;
  }
  __syncwarp();  // the new paths are there
}

template <typename C>
__device__ void write_out(const Search& s, const Row& row) {
  const std::int32_t* codes = codes_of(s, row, s.num_levels, 0);
  for (int l = row.lane; l < s.num_levels; l += kWarpSize) {
    s.codes[row.row * s.num_levels + l] = codes[l];
  }
  bool finite = true;
  for (std::int64_t d = 4 * row.lane; d < s.x.dim; d += 4 * kWarpSize) {
    const Four<C> v = load4<C>(s.x, row.row, d);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      finite = finite && v.at[i] - v.at[i] == C(0);
    }
  }
  finite = __all_sync(kAllLanes, finite);
  for (std::int64_t d = row.lane; d < s.x.dim; d += kWarpSize) {
    C sum = finite ? C(0) : C(NAN);  // what nobody checked shows
    for (int l = 0; l < s.num_levels; ++l) {
      sum += static_cast<const C*>(s.codebooks)[(s.levels[l].first + codes[l]) * s.x.dim + d];
    }
    store_one(s.quantized, s.x.dtype, row.row * s.x.dim + d, sum);
  }
}

template <typename C>
__global__ void __launch_bounds__(kThreads, 4) search_kernel(const Search s) {
  H2REC_SHARED(shared);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  for (int tile = blockIdx.x; tile < s.num_tiles; tile += gridDim.x) {
    const std::int64_t first_row = static_cast<std::int64_t>(tile) * s.tile_rows;
    // A warp has the same rows of every tile to itself.
    const auto for_each_row = [&](auto&& act) {
      for (int i = warp; i < s.tile_rows && first_row + i < s.num_rows; i += kWarps) {
        act(Row{first_row + i, static_cast<std::int64_t>(blockIdx.x) * s.tile_rows + i, i, lane});
      }
    };
    for_each_row([&](const Row& row) { start<C>(s, row); });
    int num_paths = 1;
    for (int level = 0; level < s.num_levels; ++level) {
      const Level info = s.levels[level];
      const std::int64_t extensions = static_cast<std::int64_t>(num_paths) * info.size;
      const bool last = level + 1 == s.num_levels;
      const int keep = last ? 1 : extensions < s.plan.beam_size ? static_cast<int>(extensions) : s.plan.beam_size;
      for_each_row([&](const Row& row) {
        if (level == 0 || s.tables == nullptr) {
          for (int p = 0; p < num_paths; ++p) {
            form_operand<C>(s, row, level, p);
          }
        }
        if (lane < keep) {
          s.upper_bounds[row.place * s.plan.beam_size + lane] = INFINITY;
        }
        if (lane == 0) {
          s.counts[row.place] = 0;
        }
      });
      __syncthreads();  // the operands are there
      for (int first = 0; first < info.padded; first += kCodewords) {
        multiply(operands_of(s), s.codewords + (info.padded_first + first) * s.depth, s.depth, shared);
        const Codewords codewords = load_codewords(s, info, first + 4 * lane);
        __syncthreads();  // the products are there
        for_each_row([&](const Row& row) {
          scan(s, row, level, info, num_paths, keep, codewords, reinterpret_cast<const float*>(shared));
        });
        __syncthreads();  // the products are read
      }
      for_each_row([&](const Row& row) { decide<C>(s, row, level, info, num_paths, keep); });
      num_paths = keep;
    }
    for_each_row([&](const Row& row) { write_out<C>(s, row); });
  }
}

// ---- on the host

constexpr int kBlocksPerMultiprocessor = 4;
constexpr std::int64_t kMaxTableBytes = std::int64_t{256} << 20;

std::int64_t round_up(std::int64_t value, std::int64_t step) { return (value + step - 1) / step * step; }

ErrorBound error_bound(std::int64_t dim, int num_levels) {
  const double products = 0x1p-10 + 0x1p-20 + static_cast<double>(dim) * 0x1p-21;
  const double roundings = static_cast<double>(2 * dim + 6 * num_levels + 32);
  return {static_cast<float>(2 * products), static_cast<float>(0x1p-23 * std::sqrt(static_cast<double>(dim))),
          static_cast<float>(roundings * 0x1p-24), static_cast<float>(roundings * 0x1p-149),
          static_cast<float>(1 + static_cast<double>(dim + 8) * 0x1p-24),
          static_cast<float>(0x1p-74 * std::sqrt(static_cast<double>(dim)))};
}

template <typename Act>
void for_each_level(const ResidualQuantizeArgs& args, const Act& act) {
  Level level{};
  for (int l = 0; l < args.num_levels; ++l) {
    level.size = static_cast<int>(args.sizes[l]);
    level.padded = static_cast<int>(round_up(level.size, kCodewords));
    act(l, level);
    level.table += level.first * level.padded;
    level.first += level.size;
    level.padded_first += level.padded;
  }
}

int tile_rows(const ResidualQuantizePlan& plan) { return plan.tables ? kOperands : kOperands / plan.beam_size; }

int num_tiles(const ResidualQuantizeArgs& args, const ResidualQuantizePlan& plan) {
  return static_cast<int>((args.num_rows + tile_rows(plan) - 1) / tile_rows(plan));
}

// Gives the arrays their places from `base` on, and returns how many bytes they take.
std::int64_t lay_out(const ResidualQuantizeArgs& args, Search& s, unsigned char* base) {
  std::int64_t taken = 0;
  const auto take = [&](auto*& array, std::int64_t count) {
    array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(base + taken);
    taken = round_up(taken + count * static_cast<std::int64_t>(sizeof *array), 256);
  };
  std::int64_t padded = 0, table_elements = 0;
  for_each_level(args, [&](int, const Level& level) {
    padded += level.padded;
    table_elements += level.first * level.padded;
  });
  take(s.levels, args.num_levels);
  take(s.codewords, padded * s.depth);
  take(s.squares, padded);
  take(s.scales, padded);
  take(s.norms, padded);
  const std::int64_t rows = std::int64_t{s.plan.num_blocks} * s.tile_rows, paths = rows * s.plan.beam_size;
  take(s.operands, std::int64_t{s.plan.num_blocks} * kOperands * s.depth);
  take(s.path_codes, 2 * paths * args.num_levels);
  take(s.paths, paths);
  take(s.upper_bounds, paths);
  take(s.counts, rows);
  take(s.candidates, rows * s.plan.capacity);
  take(s.lower_bounds, rows * s.plan.capacity);
  if (s.plan.tables) {
    take(s.tables, table_elements);
  }
  return taken;
}

Search make_search(const ResidualQuantizeArgs& args, const ResidualQuantizePlan& plan) {
  Search s{};
  s.x = args.x;
  s.num_rows = args.num_rows;
  s.codebooks = args.codebooks;
  s.wide_codebooks = make_rows(args.codebooks, args.compute, args.x.dim, 1, args.x.dim).wide;
  s.num_levels = args.num_levels;
  s.quantized = args.quantized;
  s.codes = args.codes;
  s.plan = plan;
  s.bound = error_bound(args.x.dim, args.num_levels);
  s.depth = static_cast<int>(round_up(std::max<std::int64_t>(args.x.dim, 1), kDepth));
  s.tile_rows = tile_rows(plan);
  s.num_tiles = num_tiles(args, plan);
  return s;
}

template <typename C>
int run(const ResidualQuantizeArgs& args, const Search& s, void* stream) {
  int error = 0;
  for_each_level(args, [&](int l, const Level& level) {
    if (error == 0) {
      error = H2REC_LAUNCH(prepare_level_kernel<C>, dim3(level.padded / kWarps), kThreads, 0, stream, s, l, level);
    }
    if (error == 0 && s.tables != nullptr && l > 0) {
      const dim3 grid(level.padded / kCodewords, static_cast<unsigned>((level.first + kTableRows - 1) / kTableRows));
      error = H2REC_LAUNCH(table_kernel<C>, grid, kThreads, kTableSharedBytes<C>, stream, s, level);
    }
  });
  if (error != 0) {
    return error;
  }
  return H2REC_LAUNCH(search_kernel<C>, dim3(s.plan.num_blocks), kThreads, kSharedBytes, stream, s);
}

}  // namespace

ResidualQuantizePlan plan_residual_quantize(const ResidualQuantizeArgs& args, int beam) {
  // Bytes from and to the L2 cache for a row. A multiplication-addition takes an H100 as long as a quarter of a byte.
  const double dim = static_cast<double>(args.x.dim), operand = 2 * dim;
  const double multiplied = operand * (kOperands + kCodewords) / kOperands / kCodewords;  // for each codeword
  double residuals = 0, tables = 4 * dim + operand, fill = 0, table_bytes = 0;
  for_each_level(args, [&](int l, const Level& level) {
    residuals += beam * ((l + 1) * 4 * dim + operand + level.padded * multiplied);
    tables += level.padded * (multiplied + beam * l * 4.0);
    const double entries = static_cast<double>(level.first) * level.padded;
    table_bytes += 4 * entries;
    fill += entries * (4 + dim / 4);
  });
  const double rows = static_cast<double>(args.num_rows);
  ResidualQuantizePlan plan{};
  plan.beam_size = beam;
  plan.tables = table_bytes <= static_cast<double>(kMaxTableBytes) && rows * tables + fill < rows * residuals;
  plan.capacity = 32 * (1 + beam / 2);
  plan.num_blocks = std::min(num_tiles(args, plan), kBlocksPerMultiprocessor * multiprocessors());
  return plan;
}

std::int64_t workspace_bytes(const ResidualQuantizeArgs& args, const ResidualQuantizePlan& plan) {
  Search s = make_search(args, plan);
  return lay_out(args, s, nullptr);
}

int residual_quantize(const ResidualQuantizeArgs& args, const ResidualQuantizePlan& plan, void* workspace, void* stream) {
  if (args.num_rows == 0) {
    return 0;
  }
  Search s = make_search(args, plan);
  lay_out(args, s, static_cast<unsigned char*>(workspace));
  return args.compute == Dtype::kFloat64 ? run<double>(args, s, stream) : run<float>(args, s, stream);
}

}  // namespace h2rec::cuda
