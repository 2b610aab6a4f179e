#include "residual_quantize.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <optional>
#include <vector>

namespace h2rec {
namespace {

template <typename T>
struct IndexOf;
template <>
struct IndexOf<float> {
  using Type = std::int32_t;
};
template <>
struct IndexOf<double> {
  using Type = std::int64_t;
};

template <typename T>
constexpr FloatType kFloatType = sizeof(T) == 4 ? FloatType::kFloat32 : FloatType::kFloat64;

template <typename T>
struct Level {
  std::int64_t size;
  const T* codewords;                    // [size, dim]
  std::int64_t first_panel, num_panels;  // of the panels of all levels
  T* panels;                             // [num_panels, dim, panel width]
  T* half_norms;                         // [num_panels * panel width]
};

// A level in 8 bits (residual_quantize_coarse.inl), and bounds of what that leaves out.
struct CoarseLevel {
  std::uint8_t* panels = nullptr;  // [num_panels, dim / 4, panel width, 4]; null: this level has none
  float* offsets;                  // [num_panels * panel width]
  float* centre;                   // [dim]
  float scale;
  float norm, error, offset, half_norm;  // the largest of all codewords; norms less the centre
  float centre_norm;
};

template <typename T>
struct Plan {
  Vectors x;
  const Level<T>* levels;
  std::int64_t num_levels, num_panels;
  std::int64_t beam_size;
  const T* const* tables;  // [levels, levels]: products of the codewords of level j < l with those of l; or null
  std::int64_t tile_rows;
  std::int64_t stride;  // of the rows of a tile
  QuantizedVectors out;
  const CoarseLevel* coarse = nullptr;  // [levels], or null: there are none
};

}  // namespace
}  // namespace h2rec

#define H2REC_KERNEL "residual_quantize.inl"
#include "for_each_isa.h"

#if defined(__x86_64__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 takes its own _mm512_undefined_* for mistakes
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,prefer-vector-width=512")
namespace h2rec::avx512 {
namespace {
#include "residual_quantize_coarse.inl"
}  // namespace
}  // namespace h2rec::avx512
#pragma GCC pop_options
#pragma GCC diagnostic pop
#endif

namespace h2rec {
namespace {

constexpr std::int64_t kCacheLine = 64;
// A tile leaves most of a level-2 cache to the codebooks.
constexpr std::int64_t kTileBytes = 256 << 10;
constexpr std::int64_t kMaxTileRows = 192;
constexpr std::int64_t kMaxTableBytes = 64 << 20;
// Multiplications that are worth waking a thread for.
constexpr std::int64_t kGrain = 1 << 18;

template <typename T>
class AlignedArray {
 public:
  explicit AlignedArray(std::int64_t count)
      : lines_(std::make_unique_for_overwrite<Line[]>((count * sizeof(T) + kCacheLine - 1) / kCacheLine)) {}
  T* get() { return reinterpret_cast<T*>(lines_.get()); }

 private:
  struct alignas(kCacheLine) Line {
    char bytes[kCacheLine];
  };
  std::unique_ptr<Line[]> lines_;
};

std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Parts per thread, when each takes so many multiplications.
std::int64_t grain_for(std::int64_t multiplications) { return divide_up(kGrain, std::max<std::int64_t>(multiplications, 1)); }

// An odd number of cache lines, so that the rows that are read together do not meet in one set of the cache.
template <typename T>
std::int64_t stride_for(std::int64_t dim) {
  constexpr std::int64_t line = kCacheLine / sizeof(T);
  return (divide_up(dim, line) | 1) * line;
}

template <typename T>
std::vector<Level<T>> lay_out_levels(const Codebooks<T>& codebooks, std::int64_t dim, std::int64_t width) {
  std::vector<Level<T>> levels;
  std::int64_t first_codeword = 0, first_panel = 0;
  for (std::int64_t l = 0; l < codebooks.levels; ++l) {
    const std::int64_t size = codebooks.sizes[l], num_panels = divide_up(size, width);
    levels.push_back({size, codebooks.data + first_codeword * dim, first_panel, num_panels, nullptr, nullptr});
    first_codeword += size;
    first_panel += num_panels;
  }
  return levels;
}

template <typename T>
std::int64_t table_bytes(const std::vector<Level<T>>& levels, std::int64_t width) {
  std::int64_t bytes = 0, codewords = 0;
  for (const Level<T>& level : levels) {
    bytes += codewords * level.num_panels * width * sizeof(T);
    codewords += level.size;
  }
  return bytes;
}

// No level leaves more paths than there are: a beam that keeps them all need not be wider.
template <typename T>
std::int64_t reachable(const std::vector<Level<T>>& levels, std::int64_t beam_size) {
  std::int64_t paths = 1;
  for (const Level<T>& level : levels) {
    if (paths > beam_size / level.size) return beam_size;
    paths *= level.size;
  }
  return paths;
}

// Whether the products that tables save, those of each path but a vector's first, are more than those that fill them.
template <typename T>
bool tables_pay(const std::vector<Level<T>>& levels, std::int64_t rows, std::int64_t beam_size) {
  double saved = 0, filled = 0;
  std::int64_t codewords = 0, beams = 1;
  for (const Level<T>& level : levels) {
    saved += static_cast<double>(rows) * static_cast<double>(beams - 1) * static_cast<double>(level.size);
    filled += static_cast<double>(codewords) * static_cast<double>(level.size);
    codewords += level.size;
    beams = std::min(beams * level.size, beam_size);
  }
  return saved > filled;
}

// Workers that take the next part when they are done with one: a thread that others keep from its work does less of it.
template <typename Worker>
void share_out(std::int64_t parts, std::int64_t grain, ParallelFor parallel_for, const Worker& worker) {
  std::atomic<std::int64_t> next = 0;
  parallel_for(0, parts, grain, [&](std::int64_t, std::int64_t) {
    worker([&] { return std::min(next.fetch_add(1, std::memory_order_relaxed), parts); });
  });
}

template <typename T>
class Tables {
 public:
  Tables(const Plan<T>& plan, std::int64_t width, ParallelFor parallel_for) : of_pairs_(plan.num_levels * plan.num_levels) {
    for (std::int64_t l = 0; l < plan.num_levels; ++l) {
      for (std::int64_t j = 0; j < l; ++j) fill(plan, j, l, width, parallel_for);
    }
  }
  const T* const* get() const { return of_pairs_.data(); }

 private:
  void fill(const Plan<T>& plan, std::int64_t earlier, std::int64_t later, std::int64_t width, ParallelFor parallel_for) {
    const Level<T>&rows = plan.levels[earlier], &columns = plan.levels[later];
    const std::int64_t block = H2REC_CHOOSE(round_up_to_rows)(1), blocks = divide_up(rows.size, block);
    T* const table = memory_.emplace_back(blocks * block * columns.num_panels * width).get();
    of_pairs_[later * plan.num_levels + earlier] = table;
    const auto fill_table = H2REC_CHOOSE(fill_table<T>);
    parallel_for(0, blocks, grain_for(block * columns.size * plan.x.dim), [&](std::int64_t first, std::int64_t last) {
      AlignedArray<T> tile(block * plan.stride + width);
      fill_table(plan, rows, first * block, std::min(last * block, rows.size), columns, table,
                 reinterpret_cast<char*>(tile.get()));
    });
  }

  std::vector<const T*> of_pairs_;
  std::vector<AlignedArray<T>> memory_;
};

template <typename T>
using QuantizeRows = void (*)(const Plan<T>&, std::int64_t, std::int64_t, char*);

// Tiles of vectors, each by the next thread that is free.
template <typename T>
void quantize_all(const Plan<T>& plan, std::int64_t width, std::int64_t bytes, QuantizeRows<T> quantize_rows,
                  ParallelFor parallel_for) {
  const std::int64_t num_tiles = divide_up(plan.x.rows, plan.tile_rows);
  const std::int64_t tile_work = plan.tile_rows * plan.x.dim * plan.num_panels * width;
  share_out(num_tiles, grain_for(tile_work), parallel_for, [&](const auto& next_tile) {
    AlignedArray<char> memory(bytes);
    for (std::int64_t tile; (tile = next_tile()) < num_tiles;) {
      quantize_rows(plan, tile * plan.tile_rows, std::min((tile + 1) * plan.tile_rows, plan.x.rows), memory.get());
    }
  });
}

#if defined(__x86_64__)
constexpr std::int64_t kMinCoarseRows = 64;  // fewer do not pay for rounding the codewords
constexpr std::int64_t kMinCoarseSize = 32, kMaxCoarseSize = 1 << 14;
constexpr std::int64_t kMaxCoarseDim = 1 << 16;  // sums of products of bytes fit into 32 bits

bool may_be_coarse(const Level<float>& level) { return level.size >= kMinCoarseSize && level.size <= kMaxCoarseSize; }

bool coarse_pays(const Plan<float>& plan) {
  return capability() >= Capability::kAvx512Vnni && plan.beam_size == 1 && plan.x.rows >= kMinCoarseRows &&
         plan.x.dim <= kMaxCoarseDim && std::any_of(plan.levels, plan.levels + plan.num_levels, may_be_coarse);
}

class CoarseLevels {
 public:
  CoarseLevels(const Plan<float>& plan, std::int64_t width, ParallelFor parallel_for)
      : levels_(plan.num_levels),
        panel_bytes_(avx512::coarse_panel_bytes(plan.x.dim)),
        panels_(plan.num_panels * panel_bytes_),
        offsets_(plan.num_panels * width),
        centres_(plan.num_levels * plan.x.dim) {
    const std::int64_t level_work = 8 * plan.x.dim * plan.num_panels * width / plan.num_levels;
    parallel_for(0, plan.num_levels, grain_for(level_work), [&](std::int64_t first, std::int64_t last) {
      AlignedArray<std::int8_t> bytes(stride_for<std::int8_t>(plan.x.dim));
      for (std::int64_t l = first; l < last; ++l) {
        const Level<float>& level = plan.levels[l];
        if (!may_be_coarse(level)) continue;
        levels_[l].panels = panels_.get() + level.first_panel * panel_bytes_;
        levels_[l].offsets = offsets_.get() + level.first_panel * width;
        levels_[l].centre = centres_.get() + l * plan.x.dim;
        avx512::round_level(level, plan.x.dim, bytes.get(), levels_[l]);
      }
    });
  }
  const CoarseLevel* get() const { return levels_.data(); }

 private:
  std::vector<CoarseLevel> levels_;
  std::int64_t panel_bytes_;
  AlignedArray<std::uint8_t> panels_;
  AlignedArray<float> offsets_, centres_;
};
#endif

}  // namespace

template <typename T>
void residual_quantize(const Vectors& x, const Codebooks<T>& codebooks, std::int64_t beam_size,
                       const QuantizedVectors& out, ParallelFor parallel_for) {
  if (x.rows == 0) return;
  const std::int64_t width = H2REC_CHOOSE(panel_width<T>)();
  std::vector<Level<T>> levels = lay_out_levels(codebooks, x.dim, width);
  const std::int64_t num_panels = levels.back().first_panel + levels.back().num_panels;

  AlignedArray<T> panels(num_panels * x.dim * width), half_norms(num_panels * width);
  const auto pack_panel = H2REC_CHOOSE(pack_panel<T>);
  for (Level<T>& level : levels) {
    level.panels = panels.get() + level.first_panel * x.dim * width;
    level.half_norms = half_norms.get() + level.first_panel * width;
    parallel_for(0, level.num_panels, grain_for(x.dim * width), [&](std::int64_t first, std::int64_t last) {
      for (std::int64_t p = first; p < last; ++p) pack_panel(level, x.dim, p);
    });
  }

  beam_size = reachable(levels, beam_size);
  Plan<T> plan{x, levels.data(), codebooks.levels, num_panels, beam_size, nullptr, 0, stride_for<T>(x.dim), out};
  std::optional<Tables<T>> tables;
  if (beam_size > 1 && table_bytes(levels, width) <= kMaxTableBytes && tables_pay(levels, x.rows, beam_size)) {
    plan.tables = tables.emplace(plan, width, parallel_for).get();
  }

  const std::int64_t row_bytes = sizeof(T) * (beam_size == 1 ? plan.stride + 2 * width
                                 : plan.tables ? plan.stride + num_panels * width
                                               : 2 * beam_size * plan.stride);
  plan.tile_rows = std::clamp<std::int64_t>(kTileBytes / row_bytes, 1, kMaxTileRows);
  if (beam_size == 1 || plan.tables) plan.tile_rows = H2REC_CHOOSE(round_up_to_rows)(plan.tile_rows);
#if defined(__x86_64__)
  if constexpr (sizeof(T) == sizeof(float)) {
    if (coarse_pays(plan)) {
      const CoarseLevels coarse(plan, width, parallel_for);
      plan.coarse = coarse.get();
      const std::int64_t bytes = avx512::coarse_tile_bytes(plan);
      return quantize_all<T>(plan, width, bytes, avx512::quantize_rows_coarsely, parallel_for);
    }
  }
#endif
  quantize_all<T>(plan, width, H2REC_CHOOSE(tile_bytes<T>)(plan), H2REC_CHOOSE(quantize_rows<T>), parallel_for);
}

template void residual_quantize(const Vectors&, const Codebooks<float>&, std::int64_t, const QuantizedVectors&,
                                ParallelFor);
template void residual_quantize(const Vectors&, const Codebooks<double>&, std::int64_t, const QuantizedVectors&,
                                ParallelFor);

}  // namespace h2rec
