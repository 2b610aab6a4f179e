// Vector code of residual_quantize.cpp, which includes it once per instruction set (for_each_isa.h) and defines the
// structs that it uses.

template <typename T>
struct Lanes {
  using Index = typename IndexOf<T>::Type;
  static constexpr int kCount = kVectorBytes / sizeof(T);
  typedef T Vector __attribute__((vector_size(kVectorBytes)));
  typedef Index IndexVector __attribute__((vector_size(kVectorBytes)));
};
template <typename T>
using Vector = typename Lanes<T>::Vector;
template <typename T>
using IndexVector = typename Lanes<T>::IndexVector;

// The micro-kernel multiplies kRows rows with kColumns vectors of codewords: as many sums as fit into the registers
// beside the operands. AVX-512 and NEON have 32 registers, the others 16.
#if defined(__aarch64__)
constexpr int kRows = 12;
#else
constexpr int kRows = kVectorBytes == 64 ? 12 : 6;
#endif
constexpr int kColumns = 2;
template <typename T>
constexpr int kPanel = kColumns * Lanes<T>::kCount;

static inline std::int64_t min(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

static std::int64_t round_up_to_rows(std::int64_t count) { return (count + kRows - 1) / kRows * kRows; }

template <typename T>
static std::int64_t panel_width() {
  return kPanel<T>;
}

// Deals out parts of one piece of memory, cache line by cache line. It starts as null to find out how much is needed.
class Carver {
 public:
  explicit Carver(char* memory) : next_(reinterpret_cast<std::uintptr_t>(memory)) {}

  template <typename U>
  U* take(std::int64_t count) {
    U* part = reinterpret_cast<U*>(next_);
    next_ += (count * sizeof(U) + 63) / 64 * 64;
    return part;
  }

  std::int64_t taken() const { return static_cast<std::int64_t>(next_); }

 private:
  std::uintptr_t next_;
};

// ---- numbers ----

static inline float float_from_bits(std::uint32_t bits) { return __builtin_bit_cast(float, bits); }
static inline std::uint32_t bits_from_float(float value) { return __builtin_bit_cast(std::uint32_t, value); }

static inline float from_bfloat16(std::uint16_t value) { return float_from_bits(std::uint32_t{value} << 16); }

static inline float from_float16(std::uint16_t value) {
  // Multiplying by 2^112 mends the exponent's bias, for subnormal numbers too. Infinity and NaN do not come.
  const float magnitude = float_from_bits((value & 0x7fffu) << 13) * float_from_bits(0x77800000u);
  return float_from_bits(bits_from_float(magnitude) | (value & 0x8000u) << 16);
}

// Both round to nearest, ties to even.
static inline std::uint16_t to_bfloat16(float value) {
  const std::uint32_t bits = bits_from_float(value);
  return value != value ? 0x7fc0 : static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

static inline std::uint16_t to_float16(float value) {
  const std::uint32_t sign = bits_from_float(value) >> 16 & 0x8000u;
  const std::uint32_t bits = bits_from_float(value) & 0x7fffffffu;
  const std::uint32_t normal = (bits - 0x38000000u + 0xfffu + (bits >> 13 & 1)) >> 13;
  const std::uint32_t subnormal = bits_from_float(float_from_bits(bits) + 0.5f) - 0x3f000000u;  // the sum rounds
  const std::uint32_t overflow = bits > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return static_cast<std::uint16_t>(sign | (bits >= 0x47800000u ? overflow : bits < 0x38800000u ? subnormal : normal));
}

template <typename T, typename S, typename Convert>
static inline void load_row(const S* source, std::int64_t step, std::int64_t dim, T* row, Convert convert) {
  if (step == 1) {
    for (std::int64_t d = 0; d < dim; ++d) row[d] = convert(source[d]);
  } else {
    for (std::int64_t d = 0; d < dim; ++d) row[d] = convert(source[d * step]);
  }
}

// Rows [begin, end) of x to a tile, whose rows up to a multiple of kRows are filled with zeros.
template <typename T>
static void load_rows(const Vectors& x, std::int64_t begin, std::int64_t end, T* tile, std::int64_t stride) {
  const auto load = [&]<typename S>(const S* data, auto convert) {
    for (std::int64_t n = begin; n < end; ++n, tile += stride) {
      load_row(data + n * x.row_stride, x.column_stride, x.dim, tile, convert);
    }
  };
  switch (x.type) {
    case FloatType::kFloat32:
      load(static_cast<const float*>(x.data), [](float value) { return T(value); });
      break;
    case FloatType::kFloat64:
      load(static_cast<const double*>(x.data), [](double value) { return T(value); });
      break;
    case FloatType::kBFloat16:
      load(static_cast<const std::uint16_t*>(x.data), [](std::uint16_t value) { return T(from_bfloat16(value)); });
      break;
    case FloatType::kFloat16:
      load(static_cast<const std::uint16_t*>(x.data), [](std::uint16_t value) { return T(from_float16(value)); });
      break;
  }
  for (std::int64_t n = end; (n - begin) % kRows != 0; ++n, tile += stride) {
    for (std::int64_t d = 0; d < stride; ++d) tile[d] = 0;
  }
}

// The sum of the chosen codewords, in the order of the levels.
template <typename T>
static void store_quantized(const Plan<T>& plan, std::int64_t n, T* sum) {
  const std::int64_t dim = plan.x.dim;
  const std::int32_t* codes = plan.out.codes + n * plan.num_levels;
  for (std::int64_t d = 0; d < dim; ++d) sum[d] = plan.levels[0].codewords[codes[0] * dim + d];
  for (std::int64_t l = 1; l < plan.num_levels; ++l) {
    const T* row = plan.levels[l].codewords + codes[l] * dim;
    for (std::int64_t d = 0; d < dim; ++d) sum[d] += row[d];
  }
  const auto store = [&]<typename S>(S* out, auto convert) {
    out += n * dim;
    for (std::int64_t d = 0; d < dim; ++d) out[d] = convert(sum[d]);
  };
  void* out = plan.out.vectors;
  switch (plan.x.type) {
    case FloatType::kFloat32:
      return store(static_cast<float*>(out), [](T value) { return static_cast<float>(value); });
    case FloatType::kFloat64:
      return store(static_cast<double*>(out), [](T value) { return static_cast<double>(value); });
    case FloatType::kBFloat16:
      return store(static_cast<std::uint16_t*>(out), [](T value) { return to_bfloat16(static_cast<float>(value)); });
    case FloatType::kFloat16:
      return store(static_cast<std::uint16_t*>(out), [](T value) { return to_float16(static_cast<float>(value)); });
  }
}

// ---- products ----

template <typename T>
static T half_norm(const T* row, std::int64_t dim) {
  double sums[8] = {}, norm = 0;  // side by side, so that they fit into vectors
  std::int64_t d = 0;
  for (; d + 8 <= dim; d += 8) {
    for (int j = 0; j < 8; ++j) sums[j] += static_cast<double>(row[d + j]) * static_cast<double>(row[d + j]);
  }
  for (; d < dim; ++d) norm += static_cast<double>(row[d]) * static_cast<double>(row[d]);
  for (const double sum : sums) norm += sum;
  return static_cast<T>(norm / 2);
}

// Panel p of a level: kPanel codewords side by side, [dim, kPanel]. What fills up the last panel is infinitely far away.
template <typename T>
static void pack_panel(const Level<T>& level, std::int64_t dim, std::int64_t p) {
  T* panel = level.panels + p * dim * kPanel<T>;
  for (std::int64_t j = 0; j < kPanel<T>; ++j) {
    const std::int64_t code = p * kPanel<T> + j;
    const bool exists = code < level.size;
    const T* codeword = level.codewords + code * dim;
    for (std::int64_t d = 0; d < dim; ++d) panel[d * kPanel<T> + j] = exists ? codeword[d] : T(0);
    level.half_norms[code] = exists ? half_norm(codeword, dim) : static_cast<T>(__builtin_inf());
  }
}

// scores = start - <row, codeword>: with |c|^2 / 2 to start from, half the squared distance without |r|^2 / 2.
template <typename T>
[[gnu::always_inline]] static inline void multiply(const T* rows, std::int64_t stride, std::int64_t dim, const T* panel,
                                                   const T* start, Vector<T> (&scores)[kRows][kColumns]) {
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
    scores[r][0] = reinterpret_cast<const Vector<T>*>(start)[0];
    scores[r][1] = reinterpret_cast<const Vector<T>*>(start)[1];
  }
  for (std::int64_t d = 0; d < dim; ++d, panel += kPanel<T>) {
    const Vector<T> left = reinterpret_cast<const Vector<T>*>(panel)[0];
    const Vector<T> right = reinterpret_cast<const Vector<T>*>(panel)[1];
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const T value = rows[r * stride + d];
      scores[r][0] -= value * left;
      scores[r][1] -= value * right;
    }
  }
}

// As multiply, to memory: scores [kRows, kPanel], with a stride.
template <typename T>
static void multiply_to(const T* rows, std::int64_t stride, std::int64_t dim, const T* panel, const T* start, T* scores,
                        std::int64_t scores_stride) {
  Vector<T> sums[kRows][kColumns];
  multiply(rows, stride, dim, panel, start, sums);
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
    reinterpret_cast<Vector<T>*>(scores + r * scores_stride)[0] = sums[r][0];
    reinterpret_cast<Vector<T>*>(scores + r * scores_stride)[1] = sums[r][1];
  }
}

// The rows of a tile with all panels: [rows, all panels, kPanel].
template <typename T>
static void multiply_all(const T* rows, std::int64_t stride, std::int64_t num_rows, std::int64_t dim, const T* panels,
                         const T* starts, std::int64_t num_panels, T* scores) {
  for (std::int64_t p = 0; p < num_panels; ++p) {
    for (std::int64_t r = 0; r < num_rows; r += kRows) {
      multiply_to(rows + r * stride, stride, dim, panels + p * dim * kPanel<T>, starts + p * kPanel<T>,
                  scores + (r * num_panels + p) * kPanel<T>, num_panels * kPanel<T>);
    }
  }
}

template <typename T>
static void subtract(const T* a, const T* b, std::int64_t dim, T* difference) {
  for (std::int64_t d = 0; d < dim; ++d) difference[d] = a[d] - b[d];
}

// ---- one path per vector: residuals stay in the tile, scores in the registers ----

// The nearest codeword of each row. A lane of `least` and `where` sees every kCount-th codeword in ascending order and
// moves to a strictly nearer one only, so that it ends at its lowest index.
template <typename T>
static void find_nearest(const T* rows, std::int64_t stride, std::int64_t num_rows, std::int64_t dim,
                         const Level<T>& level, Vector<T>* least, IndexVector<T>* where) {
  using Index = typename Lanes<T>::Index;
  IndexVector<T> lanes;
  for (int j = 0; j < Lanes<T>::kCount; ++j) lanes[j] = j;
  for (std::int64_t r = 0; r < num_rows; ++r) {
    least[r] = Vector<T>{} + static_cast<T>(__builtin_inf());
    where[r] = IndexVector<T>{};
  }
  for (std::int64_t p = 0; p < level.num_panels; ++p) {
    const IndexVector<T> indices = lanes + static_cast<Index>(p * kPanel<T>);
    for (std::int64_t first = 0; first < num_rows; first += kRows) {
      Vector<T> scores[kRows][kColumns];
      multiply(rows + first * stride, stride, dim, level.panels + p * dim * kPanel<T>,
               level.half_norms + p * kPanel<T>, scores);
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
        Vector<T> nearest = least[first + r];
        IndexVector<T> index = where[first + r];
#pragma GCC unroll 2
        for (int c = 0; c < kColumns; ++c) {
          const auto nearer = scores[r][c] < nearest;
          nearest = nearer ? scores[r][c] : nearest;
          index = nearer ? indices + static_cast<Index>(c * Lanes<T>::kCount) : index;
        }
        least[first + r] = nearest;
        where[first + r] = index;
      }
    }
  }
}

template <typename T>
static std::int32_t lowest_index_of_least(Vector<T> least, IndexVector<T> where) {
  T value = least[0];
  auto index = where[0];
  for (int j = 1; j < Lanes<T>::kCount; ++j) {
    const bool better = least[j] < value || (least[j] == value && where[j] < index);
    value = better ? least[j] : value;
    index = better ? where[j] : index;
  }
  return static_cast<std::int32_t>(index);
}

template <typename T>
struct PathTile {
  T* residuals;           // [tile_rows, stride]
  Vector<T>* least;       // [tile_rows]
  IndexVector<T>* where;  // [tile_rows]

  PathTile(const Plan<T>& plan, Carver& memory)
      : residuals(memory.take<T>(plan.tile_rows * plan.stride)),
        least(memory.take<Vector<T>>(plan.tile_rows)),
        where(memory.take<IndexVector<T>>(plan.tile_rows)) {}
};

// Codes of residuals that follow one another, [num_rows] in steps of the number of levels.
template <typename T>
static void find_codes(const Plan<T>& plan, const Level<T>& level, const T* rows, std::int64_t num_rows,
                       const PathTile<T>& tile, std::int32_t* codes) {
  find_nearest(rows, plan.stride, round_up_to_rows(num_rows), plan.x.dim, level, tile.least, tile.where);
  for (std::int64_t r = 0; r < num_rows; ++r) {
    codes[r * plan.num_levels] = lowest_index_of_least<T>(tile.least[r], tile.where[r]);
  }
}

// Vectors [first, last): at most tile_rows. find(level, number of rows, codes) finds those of the tile's residuals.
template <typename T, typename Find>
static void quantize_tile(const Plan<T>& plan, std::int64_t first, std::int64_t last, const PathTile<T>& tile,
                          const Find& find) {
  const std::int64_t dim = plan.x.dim, num_rows = last - first;
  load_rows(plan.x, first, last, tile.residuals, plan.stride);
  std::int32_t* const codes = plan.out.codes + first * plan.num_levels;
  for (std::int64_t l = 0; l < plan.num_levels; ++l) {
    find(l, num_rows, codes + l);
    for (std::int64_t r = 0; r < num_rows; ++r) {
      T* residual = tile.residuals + r * plan.stride;
      subtract(residual, plan.levels[l].codewords + codes[r * plan.num_levels + l] * dim, dim, residual);
    }
  }
  for (std::int64_t r = 0; r < num_rows; ++r) store_quantized(plan, first + r, tile.residuals);
}

// ---- beam search: several paths per vector ----

template <typename T>
static inline bool any(IndexVector<T> mask) {
  typedef long long Words __attribute__((vector_size(kVectorBytes)));
#if defined(__AVX512F__)
  if constexpr (kVectorBytes == 64) {
    const Words all = reinterpret_cast<Words>(mask);
    return __builtin_ia32_ptestmq512(all, all, 0xff) != 0;
  }
#endif
  const Words words = reinterpret_cast<Words>(mask);
  long long all = 0;
  for (int i = 0; i < kVectorBytes / 8; ++i) all |= words[i];
  return all != 0;
}

// The best (path, codeword) pairs of a vector: least error first, then earlier path, then lower code.
template <typename T>
struct Candidates {
  T* errors;            // [capacity]
  std::int64_t* pairs;  // [capacity], path * size of the level + code
  std::int64_t capacity, count;

  bool full() const { return count == capacity; }

  void insert(T error, std::int64_t pair) {
    std::int64_t i = full() ? count - 1 : count++;
    for (; i > 0 && (error < errors[i - 1] || (error == errors[i - 1] && pair < pairs[i - 1])); --i) {
      errors[i] = errors[i - 1];
      pairs[i] = pairs[i - 1];
    }
    errors[i] = error;
    pairs[i] = pair;
  }

  void offer(T error, std::int64_t pair) {
    if (!full() || error < errors[count - 1] || (error == errors[count - 1] && pair < pairs[count - 1])) {
      insert(error, pair);
    }
  }

  // Errors of the `num_lanes` pairs from first_pair on. Once the list is full, few vectors hold one that is good enough.
  void offer(Vector<T> lanes, std::int64_t num_lanes, std::int64_t first_pair) {
    if (full() && !any<T>(lanes <= errors[count - 1])) return;
    for (std::int64_t j = 0; j < num_lanes; ++j) offer(lanes[j], first_pair + j);
  }
};

// At least the count-th least of all lanes of the vectors whose minima, lane by lane, are `minima`: each is one of them.
template <typename T>
static T upper_bound(Vector<T> minima, std::int64_t count) {
  constexpr int kCount = Lanes<T>::kCount;
  if (count > kCount) return static_cast<T>(__builtin_inf());
  IndexVector<T> less{};  // how many minima are less than this one
  for (int j = 0; j < kCount; ++j) less -= Vector<T>{} + minima[j] < minima;
  T bound = minima[0];
  for (int j = 0; j < kCount; ++j) bound = less[j] == 0 ? minima[j] : bound;
  for (int j = 0; j < kCount; ++j) bound = less[j] < count && minima[j] > bound ? minima[j] : bound;
  return bound;
}

template <typename T>
static std::int64_t most_panels(const Plan<T>& plan) {
  std::int64_t most = 0;
  for (std::int64_t l = 0; l < plan.num_levels; ++l) {
    most = plan.levels[l].num_panels > most ? plan.levels[l].num_panels : most;
  }
  return most;
}

// The paths of a tile's vectors, best first: path b of vector v is number v * beams + b.
template <typename T>
struct BeamTile {
  std::int64_t beams = 1;            // paths per vector so far
  T *rows, *next_rows;               // [paths, stride] residuals; with plan.tables [vectors, stride], the vectors
  T *errors, *candidate_errors;      // [paths] half the squared distance, less what the paths of a vector share
  std::int32_t *codes, *next_codes;  // [paths, levels]
  std::int64_t* candidate_pairs;     // [paths]
  Candidates<T>* candidates;         // [vectors]
  T* scores;                         // [kRows, kPanel]; with plan.tables [vectors, codewords of all levels, padded]
  T* pair_errors;                    // with plan.tables [paths of a vector, codewords of a level, padded]

  BeamTile(const Plan<T>& plan, Carver& memory) {
    const std::int64_t paths = plan.tile_rows * plan.beam_size;
    const std::int64_t num_rows = round_up_to_rows(plan.tables ? plan.tile_rows : paths);
    rows = memory.take<T>(num_rows * plan.stride);
    next_rows = memory.take<T>(plan.tables ? 0 : num_rows * plan.stride);
    errors = memory.take<T>(paths);
    candidate_errors = memory.take<T>(paths);
    codes = memory.take<std::int32_t>(paths * plan.num_levels);
    next_codes = memory.take<std::int32_t>(paths * plan.num_levels);
    candidate_pairs = memory.take<std::int64_t>(paths);
    candidates = memory.take<Candidates<T>>(plan.tile_rows);
    scores = memory.take<T>(plan.tables ? num_rows * plan.num_panels * kPanel<T> : kRows * kPanel<T>);
    pair_errors = memory.take<T>(plan.tables ? plan.beam_size * most_panels(plan) * kPanel<T> : 0);
  }
};

// Scores of residuals.
template <typename T>
static void offer_by_residuals(const Plan<T>& plan, const Level<T>& level, std::int64_t num_vectors,
                               const BeamTile<T>& tile) {
  const std::int64_t dim = plan.x.dim, num_paths = num_vectors * tile.beams;
  for (std::int64_t p = 0; p < level.num_panels; ++p) {
    for (std::int64_t first = 0; first < num_paths; first += kRows) {
      multiply_to(tile.rows + first * plan.stride, plan.stride, dim, level.panels + p * dim * kPanel<T>,
                  level.half_norms + p * kPanel<T>, tile.scores, kPanel<T>);
      for (std::int64_t path = first; path < min(first + kRows, num_paths); ++path) {
        const Vector<T>* scores = reinterpret_cast<const Vector<T>*>(tile.scores + (path - first) * kPanel<T>);
        for (std::int64_t code = p * kPanel<T>; code < min((p + 1) * kPanel<T>, level.size);
             code += Lanes<T>::kCount) {
          tile.candidates[path / tile.beams].offer(tile.errors[path] + *scores++,
                                                   min(level.size - code, Lanes<T>::kCount),
                                                   path % tile.beams * level.size + code);
        }
      }
    }
  }
}

// Scores of the vectors themselves, mended by the products of the codewords chosen so far with those of this level.
template <typename T>
static void offer_by_tables(const Plan<T>& plan, std::int64_t l, std::int64_t num_vectors, const BeamTile<T>& tile) {
  constexpr std::int64_t kCount = Lanes<T>::kCount;
  const Level<T>& level = plan.levels[l];
  const std::int64_t padded = level.num_panels * kPanel<T>;
  for (std::int64_t v = 0; v < num_vectors; ++v) {
    const T* scores = tile.scores + (v * plan.num_panels + level.first_panel) * kPanel<T>;
    Candidates<T>& candidates = tile.candidates[v];
    Vector<T> minima = Vector<T>{} + static_cast<T>(__builtin_inf());
    for (std::int64_t b = 0; b < tile.beams; ++b) {
      const std::int64_t path = v * tile.beams + b;
      T* const errors = tile.pair_errors + b * padded;
      for (std::int64_t code = 0; code < padded; ++code) errors[code] = tile.errors[path] + scores[code];
      for (std::int64_t j = 0; j < l; ++j) {
        const std::int64_t earlier = tile.codes[path * plan.num_levels + j];
        subtract(errors, plan.tables[l * plan.num_levels + j] + earlier * padded, padded, errors);
      }
      for (std::int64_t code = 0; code < padded; code += kCount) {
        const Vector<T> sums = *reinterpret_cast<const Vector<T>*>(errors + code);
        minima = sums < minima ? sums : minima;
      }
    }
    const T bound = upper_bound<T>(minima, candidates.capacity);
    for (std::int64_t b = 0; b < tile.beams; ++b) {
      const T* const errors = tile.pair_errors + b * padded;
      for (std::int64_t code = 0; code < padded; code += kPanel<T>) {
        const Vector<T>* panel = reinterpret_cast<const Vector<T>*>(errors + code);
        const Vector<T> least = panel[0] < panel[1] ? panel[0] : panel[1];
        if (!any<T>(~(least > bound))) continue;  // NaN, which no bound keeps out, goes on
        for (std::int64_t k = code; k < min(code + kPanel<T>, level.size); ++k) {
          if (!(errors[k] > bound)) candidates.offer(errors[k], b * level.size + k);
        }
      }
    }
  }
}

// The candidates become the paths.
template <typename T>
static void extend_paths(const Plan<T>& plan, std::int64_t l, std::int64_t num_vectors, BeamTile<T>& tile) {
  const Level<T>& level = plan.levels[l];
  const std::int64_t kept = tile.candidates[0].capacity;
  for (std::int64_t path = 0; path < num_vectors * kept; ++path) {
    const std::int64_t v = path / kept, pair = tile.candidates[v].pairs[path % kept];
    const std::int64_t parent = v * tile.beams + pair / level.size, code = pair % level.size;
    std::int32_t* codes = tile.next_codes + path * plan.num_levels;
    for (std::int64_t j = 0; j < l; ++j) codes[j] = tile.codes[parent * plan.num_levels + j];
    codes[l] = static_cast<std::int32_t>(code);
    if (plan.tables) {
      tile.errors[path] = tile.candidates[v].errors[path % kept];
    } else {
      T* residual = tile.next_rows + path * plan.stride;
      subtract(tile.rows + parent * plan.stride, level.codewords + code * plan.x.dim, plan.x.dim, residual);
      tile.errors[path] = half_norm(residual, plan.x.dim);
    }
  }
  T* const rows = tile.rows;
  std::int32_t* const codes = tile.codes;
  if (!plan.tables) tile.rows = tile.next_rows, tile.next_rows = rows;
  tile.codes = tile.next_codes;
  tile.next_codes = codes;
  tile.beams = kept;
}

template <typename T>
static void search_tile(const Plan<T>& plan, std::int64_t first, std::int64_t last, BeamTile<T> tile) {
  const std::int64_t num_vectors = last - first;
  load_rows(plan.x, first, last, tile.rows, plan.stride);
  if (plan.tables) {
    multiply_all(tile.rows, plan.stride, num_vectors, plan.x.dim, plan.levels[0].panels, plan.levels[0].half_norms,
                 plan.num_panels, tile.scores);
  }
  for (std::int64_t v = 0; v < num_vectors; ++v) tile.errors[v] = 0;
  for (std::int64_t l = 0; l < plan.num_levels; ++l) {
    const std::int64_t kept = min(tile.beams * plan.levels[l].size, plan.beam_size);
    for (std::int64_t v = 0; v < num_vectors; ++v) {
      tile.candidates[v] = {tile.candidate_errors + v * kept, tile.candidate_pairs + v * kept, kept, 0};
    }
    if (plan.tables) {
      offer_by_tables(plan, l, num_vectors, tile);
    } else {
      offer_by_residuals(plan, plan.levels[l], num_vectors, tile);
    }
    extend_paths(plan, l, num_vectors, tile);
  }
  for (std::int64_t v = 0; v < num_vectors; ++v) {
    const std::int32_t* best = tile.codes + v * tile.beams * plan.num_levels;
    for (std::int64_t l = 0; l < plan.num_levels; ++l) plan.out.codes[(first + v) * plan.num_levels + l] = best[l];
    store_quantized(plan, first + v, tile.rows);
  }
}

// Products of codewords [first, last) of one level with all of another, negative as `multiply` gives them; the table's
// rows go on to a multiple of kRows.
template <typename T>
static void fill_table(const Plan<T>& plan, const Level<T>& rows, std::int64_t first, std::int64_t last,
                       const Level<T>& columns, T* table, char* memory) {
  Carver carver(memory);
  T* tile = carver.take<T>(kRows * plan.stride);
  T* zeros = carver.take<T>(kPanel<T>);
  for (int j = 0; j < kPanel<T>; ++j) zeros[j] = 0;
  const std::int64_t dim = plan.x.dim;
  const Vectors codewords{rows.codewords, kFloatType<T>, rows.size, dim, dim, 1};
  for (; first < last; first += kRows) {
    load_rows(codewords, first, min(first + kRows, last), tile, plan.stride);
    for (std::int64_t p = 0; p < columns.num_panels; ++p) {
      multiply_to(tile, plan.stride, dim, columns.panels + p * dim * kPanel<T>, zeros,
                  table + (first * columns.num_panels + p) * kPanel<T>, columns.num_panels * kPanel<T>);
    }
  }
}

// ---- what residual_quantize.cpp calls ----

template <typename T>
static std::int64_t tile_bytes(const Plan<T>& plan) {
  Carver carver(nullptr);
  if (plan.beam_size == 1) {
    PathTile<T>(plan, carver);
  } else {
    BeamTile<T>(plan, carver);
  }
  return carver.taken();
}

template <typename T>
static void quantize_rows(const Plan<T>& plan, std::int64_t first, std::int64_t last, char* memory) {
  Carver carver(memory);
  if (plan.beam_size == 1) {
    const PathTile<T> tile(plan, carver);
    quantize_tile(plan, first, last, tile, [&](std::int64_t l, std::int64_t num_rows, std::int32_t* codes) {
      find_codes(plan, plan.levels[l], tile.residuals, num_rows, tile, codes);
    });
  } else {
    search_tile(plan, first, last, BeamTile<T>(plan, carver));
  }
}
