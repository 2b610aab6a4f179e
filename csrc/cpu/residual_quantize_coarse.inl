// Nearest codewords with products of bytes, for AVX512-VNNI; residual_quantize.cpp includes this after the AVX-512
// kernels. Coarse scores, four times as quick as those in fp32, leave a few candidates, and fp32 decides among these
// exactly as find_nearest would. README.md derives the bounds.

constexpr int kWidth = kPanel<float>;  // codewords side by side
constexpr int kGroup = 4;              // bytes that one lane of an instruction multiplies and adds
constexpr int kMaxCandidates = 64;
constexpr int kChains = 8;

constexpr float kUnit = 0x1p-24f;     // relative error of a rounding
constexpr float kSlack = 1.005f;      // for the roundings of a bound itself, of sums of up to 65,536 numbers
constexpr float kLost = 2e-19f;       // the square of less than this may be no normal number
constexpr float kUnderflow = 3e-38f;  // absolute error of a product, where results that are not normal count as zero
constexpr float kTooLarge = 1e37f;    // sums of a few such numbers stay finite

static inline std::int64_t groups_of(std::int64_t dim) { return (dim + kGroup - 1) / kGroup; }
static inline std::int64_t padded(std::int64_t dim) { return (dim + 15) / 16 * 16; }

static std::int64_t coarse_panel_bytes(std::int64_t dim) { return groups_of(dim) * kGroup * kWidth; }

// body(d, mask) for every 16 dimensions from d on.
template <typename Body>
[[gnu::always_inline]] static inline void for_each_vector(std::int64_t dim, const Body& body) {
  std::int64_t d = 0;
  for (; d + 16 <= dim; d += 16) body(d, static_cast<__mmask16>(0xffff));
  if (d < dim) body(d, static_cast<__mmask16>((1u << (dim - d)) - 1));
}

static inline __m512 load(const float* values, std::int64_t d, __mmask16 mask) {
  return _mm512_maskz_loadu_ps(mask, values + d);
}

// ---- from fp32 to 8 bits ----

static inline float largest_magnitude(const float* row, const float* centre, std::int64_t dim) {
  __m512 largest = _mm512_setzero_ps();
  for_each_vector(dim, [&](std::int64_t d, __mmask16 mask) {
    largest = _mm512_max_ps(_mm512_abs_ps(_mm512_sub_ps(load(row, d, mask), load(centre, d, mask))), largest);
  });
  return _mm512_reduce_max_ps(largest);
}

// A row is centre + scale * bytes + error.
struct Rounded {
  float norm, error;  // upper bounds of |row - centre| and of |error|
  float on_centre;    // <row - centre, centre>
  std::int32_t sum;   // of the bytes
};

// 0 where the product of two scales might not be a normal number.
static inline float scale_for(float largest) { return largest > 1e-16f ? largest / 127 : 0; }

// Writes padded(dim) bytes.
static inline Rounded round_row(const float* row, const float* centre, std::int64_t dim, float scale,
                                std::int8_t* bytes) {
  const __m512 step = _mm512_set1_ps(scale), inverse = _mm512_set1_ps(scale > 0 ? 1 / scale : 0);
  __m512 norm = _mm512_setzero_ps(), error = norm, on_centre = norm;
  __m512i sum = _mm512_setzero_si512();
  for_each_vector(dim, [&](std::int64_t d, __mmask16 mask) {
    const __m512 origin = load(centre, d, mask), value = _mm512_sub_ps(load(row, d, mask), origin);
    const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(value, inverse));
    const __m512 left = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(rounded), step, value);
    norm = _mm512_fmadd_ps(value, value, norm);
    error = _mm512_fmadd_ps(left, left, error);
    on_centre = _mm512_fmadd_ps(value, origin, on_centre);
    sum = _mm512_add_epi32(sum, rounded);
    _mm_store_si128(reinterpret_cast<__m128i*>(bytes + d), _mm512_cvtsepi32_epi8(rounded));
  });
  const auto root = [&](__m512 squares) {
    return kSlack * __builtin_sqrtf(_mm512_reduce_add_ps(squares)) + static_cast<float>(dim) * kLost;
  };
  return {root(norm), root(error), _mm512_reduce_add_ps(on_centre), _mm512_reduce_add_epi32(sum)};
}

static double dot(const float* a, const float* b, std::int64_t dim) {
  double sums[8] = {}, total = 0;  // side by side, so that they fit into vectors
  std::int64_t d = 0;
  for (; d + 8 <= dim; d += 8) {
    for (int j = 0; j < 8; ++j) sums[j] += static_cast<double>(a[d + j]) * static_cast<double>(b[d + j]);
  }
  for (; d < dim; ++d) total += static_cast<double>(a[d]) * static_cast<double>(b[d]);
  for (const double sum : sums) total += sum;
  return total;
}

// `bytes` has room for padded(dim).
static void round_level(const Level<float>& level, std::int64_t dim, std::int8_t* bytes, CoarseLevel& coarse) {
  for (std::int64_t d = 0; d < dim; ++d) coarse.centre[d] = 0;
  for (std::int64_t k = 0; k < level.size; ++k) {
    for (std::int64_t d = 0; d < dim; ++d) coarse.centre[d] += level.codewords[k * dim + d];
  }
  for (std::int64_t d = 0; d < dim; ++d) coarse.centre[d] /= static_cast<float>(level.size);
  float largest = 0;
  for (std::int64_t k = 0; k < level.size; ++k) {
    const float magnitude = largest_magnitude(level.codewords + k * dim, coarse.centre, dim);
    largest = magnitude > largest ? magnitude : largest;
  }
  coarse.scale = scale_for(largest);
  coarse.norm = coarse.error = coarse.offset = coarse.half_norm = 0;
  const auto raise = [](float& bound, float value) {  // NaN stays
    bound = value <= bound || bound != bound ? bound : value;
  };
  for (std::int64_t k = 0; k < level.num_panels * kWidth; ++k) {
    std::uint8_t* const panel = coarse.panels + k / kWidth * coarse_panel_bytes(dim);
    std::int32_t* const column = reinterpret_cast<std::int32_t*>(panel) + k % kWidth;
    if (k >= level.size) {
      for (std::int64_t g = 0; g < groups_of(dim); ++g) column[g * kWidth] = 0;
      coarse.offsets[k] = __builtin_inff();
      continue;
    }
    const float* codeword = level.codewords + k * dim;
    const Rounded rounded = round_row(codeword, coarse.centre, dim, coarse.scale, bytes);
    for (std::int64_t g = 0; g < groups_of(dim); ++g) {
      column[g * kWidth] = reinterpret_cast<const std::int32_t*>(bytes)[g] ^ 0x80808080;  // 128 is added to each byte
    }
    coarse.offsets[k] = static_cast<float>(level.half_norms[k] - dot(coarse.centre, codeword, dim));
    raise(coarse.norm, rounded.norm);
    raise(coarse.error, rounded.error);
    raise(coarse.offset, __builtin_fabsf(coarse.offsets[k]));
    raise(coarse.half_norm, level.half_norms[k]);
  }
  coarse.centre_norm = static_cast<float>(__builtin_sqrt(dot(coarse.centre, coarse.centre, dim))) * kSlack;
}

// ---- kRows rows with all codewords of a level ----

struct CoarseTile {
  std::int8_t* bytes;  // [kRows, padded(dim)]
  float* scores;       // [kRows, scores_stride]
  std::int64_t scores_stride;

  CoarseTile(const Plan<float>& plan, Carver& memory) {
    std::int64_t most_panels = 0;
    for (std::int64_t l = 0; l < plan.num_levels; ++l) {
      const std::int64_t panels = plan.levels[l].num_panels;
      most_panels = plan.coarse[l].panels != nullptr && panels > most_panels ? panels : most_panels;
    }
    scores_stride = most_panels * kWidth;
    bytes = memory.take<std::int8_t>(kRows * padded(plan.x.dim));
    scores = memory.take<float>(kRows * scores_stride);
  }
};

// Adds to each lane the products of its group of bytes. GCC 12 surrounds _mm512_dpbusd_epi32 with copies of the sums.
static inline void add_products(__m512i& sums, __m512i codewords, __m512i row) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(codewords), "v"(row));
}

// scores = offset - scale * <bytes, codeword>. Not to be inlined: elsewhere there are not enough registers.
[[gnu::noinline]] static void multiply_coarse(const Plan<float>& plan, const Level<float>& level,
                                              const CoarseLevel& coarse, const Rounded (&rounded)[kRows],
                                              const float (&scales)[kRows], const CoarseTile& tile) {
  const std::int64_t groups = groups_of(plan.x.dim), stride = padded(plan.x.dim) / kGroup;
  const __m512i* panel = reinterpret_cast<const __m512i*>(coarse.panels);
  for (std::int64_t p = 0; p < level.num_panels; ++p) {
    __m512i sums[kRows][kColumns];
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const std::uint32_t sum = rounded[r].sum;  // without sign, for that of a row that is not finite may be any number
      sums[r][0] = sums[r][1] = _mm512_set1_epi32(static_cast<std::int32_t>(-128 * sum));
    }
    const std::int32_t* row = reinterpret_cast<const std::int32_t*>(tile.bytes);
    for (std::int64_t g = 0; g < groups; ++g, ++row, panel += kColumns) {
      const __m512i left = panel[0], right = panel[1];
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
        const __m512i group = _mm512_set1_epi32(row[r * stride]);
        add_products(sums[r][0], left, group);
        add_products(sums[r][1], right, group);
      }
    }
    const float* offsets = coarse.offsets + p * kWidth;
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const __m512 scale = _mm512_set1_ps(scales[r] * coarse.scale);
      float* scores = tile.scores + r * tile.scores_stride + p * kWidth;
#pragma GCC unroll 2
      for (int c = 0; c < kColumns; ++c) {
        const __m512 products = _mm512_cvtepi32_ps(sums[r][c]), offset = _mm512_load_ps(offsets + 16 * c);
        _mm512_store_ps(scores + 16 * c, _mm512_fnmadd_ps(products, scale, offset));
      }
    }
  }
}

// ---- candidates of one row ----

// How far scores may be from exact ones: coarse ones; sums in fp32, of find_nearest, score_of and Rounded::on_centre.
struct Bounds {
  float coarse, fine;
};

static inline Bounds bounds_of(const Rounded& row, const CoarseLevel& level, std::int64_t dim) {
  const float size = static_cast<float>(dim), coarse_norm = level.norm + level.error;
  const float coarse_values = level.offset + (row.norm + row.error) * coarse_norm;
  // |row| and |codeword| by way of the centre: half_norm may have lost the square of a small codeword.
  const float values = level.half_norm + (row.norm + level.centre_norm) * (level.norm + level.centre_norm);
  const bool finite = coarse_values + values < kTooLarge;
  const float products = row.error * coarse_norm + row.norm * level.error;
  return {finite ? kSlack * (products + 8 * kUnit * coarse_values) : __builtin_inff(),
          kSlack * (size + 4) * kUnit * values + size * kUnderflow};
}

struct CandidateList {
  std::int64_t count = 0;
  std::int32_t codes[kMaxCandidates + 16];
};

static inline __m512i first_codes() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }

// One with the least score.
static inline std::int32_t find_least(const float* scores, std::int64_t count) {
  __m512 least = _mm512_load_ps(scores);
  __m512i codes = first_codes(), where = codes;
  for (std::int64_t k = 16; k < count; k += 16) {
    const __m512 score = _mm512_load_ps(scores + k);
    codes = _mm512_add_epi32(codes, _mm512_set1_epi32(16));
    where = _mm512_mask_mov_epi32(where, _mm512_cmp_ps_mask(score, least, _CMP_LT_OQ), codes);
    least = _mm512_min_ps(score, least);
  }
  const __mmask16 lowest = _mm512_cmp_ps_mask(least, _mm512_set1_ps(_mm512_reduce_min_ps(least)), _CMP_EQ_OQ);
  return _mm_cvtsi128_si32(_mm512_castsi512_si128(_mm512_maskz_compress_epi32(lowest, where)));
}

// The codes, in ascending order, of scores up to `limit`. False if they are too many.
static inline bool collect(const float* scores, std::int64_t count, float limit, CandidateList& candidates) {
  __m512i codes = first_codes();
  for (std::int64_t k = 0; k < count && candidates.count <= kMaxCandidates; k += 16) {
    // No branch, for it would be hard to predict.
    const __mmask16 mask = _mm512_cmp_ps_mask(_mm512_load_ps(scores + k), _mm512_set1_ps(limit), _CMP_LE_OQ);
    _mm512_storeu_si512(candidates.codes + candidates.count, _mm512_maskz_compress_epi32(mask, codes));
    candidates.count += __builtin_popcount(mask);
    codes = _mm512_add_epi32(codes, _mm512_set1_epi32(16));
  }
  return candidates.count <= kMaxCandidates;
}

// |c|^2 / 2 - <row, c>, summed in some order.
static inline float score_of(const float* row, const Level<float>& level, std::int64_t dim, std::int32_t code) {
  const float* codeword = level.codewords + code * dim;
  __m512 sums = _mm512_setzero_ps();
  for_each_vector(dim, [&](std::int64_t d, __mmask16 mask) {
    sums = _mm512_fmadd_ps(load(row, d, mask), load(codeword, d, mask), sums);
  });
  return level.half_norms[code] - _mm512_reduce_add_ps(sums);
}

// Leaves those whose score is up to `slack` above the least.
static void narrow(const float* row, const Level<float>& level, std::int64_t dim, float slack,
                   CandidateList& candidates) {
  float scores[kMaxCandidates], least = __builtin_inff();
  for (std::int64_t i = 0; i < candidates.count; ++i) {
    scores[i] = score_of(row, level, dim, candidates.codes[i]);
    least = scores[i] < least ? scores[i] : least;
  }
  std::int64_t kept = 0;
  for (std::int64_t i = 0; i < candidates.count; ++i) {
    if (scores[i] <= least + slack) candidates.codes[kept++] = candidates.codes[i];
  }
  candidates.count = kept;
}

// The nearest by the sums of `multiply`, rounding by rounding; the lowest index on a tie.
static std::int32_t decide(const float* row, const Level<float>& level, std::int64_t dim,
                           const CandidateList& candidates) {
  float least = __builtin_inff();
  std::int32_t code = candidates.codes[0];
  for (std::int64_t first = 0; first < candidates.count; first += kChains) {
    const std::int64_t count = min(candidates.count - first, kChains);
    float scores[kChains];
    const float* codewords[kChains];
    for (int i = 0; i < kChains; ++i) {  // those beyond the last repeat the first
      const std::int32_t k = candidates.codes[i < count ? first + i : first];
      scores[i] = level.half_norms[k];
      codewords[i] = level.codewords + k * dim;
    }
    for (std::int64_t d = 0; d < dim; ++d) {
      for (int i = 0; i < kChains; ++i) scores[i] = __builtin_fmaf(-row[d], codewords[i][d], scores[i]);
    }
    for (std::int64_t i = 0; i < count; ++i) {
      if (scores[i] < least) least = scores[i], code = candidates.codes[first + i];
    }
  }
  return code;
}

// ---- what takes find_nearest's place ----

// kRows rows. False if one of the first num_rows has no finite bound, or too many candidates.
static bool find_candidates(const Plan<float>& plan, const Level<float>& level, const CoarseLevel& coarse,
                            const float* rows, std::int64_t num_rows, const CoarseTile& tile, std::int32_t* codes) {
  const std::int64_t dim = plan.x.dim, num_codes = level.num_panels * kWidth;
  Rounded rounded[kRows];
  float scales[kRows];
  for (int r = 0; r < kRows; ++r) {
    const float* row = rows + r * plan.stride;
    scales[r] = scale_for(largest_magnitude(row, coarse.centre, dim));
    rounded[r] = round_row(row, coarse.centre, dim, scales[r], tile.bytes + r * padded(dim));
  }
  multiply_coarse(plan, level, coarse, rounded, scales, tile);

  // Step by step for all rows, as the steps of one row wait for each other.
  std::int32_t pivots[kRows];
  for (int r = 0; r < kRows; ++r) pivots[r] = find_least(tile.scores + r * tile.scores_stride, num_codes);
  float limits[kRows], slacks[kRows];  // of coarse scores; between sums in fp32
  for (int r = 0; r < kRows; ++r) {
    const Bounds bounds = bounds_of(rounded[r], coarse, dim);
    slacks[r] = 4 * kSlack * bounds.fine;
    const float score = score_of(rows + r * plan.stride, level, dim, pivots[r]);
    limits[r] = score + rounded[r].on_centre + bounds.coarse + slacks[r];
  }
  for (std::int64_t r = 0; r < num_rows; ++r) {
    CandidateList candidates;
    const float* scores = tile.scores + r * tile.scores_stride;
    if (!(limits[r] < kTooLarge) || !collect(scores, num_codes, limits[r], candidates)) return false;
    const float* row = rows + r * plan.stride;
    if (candidates.count > 1) narrow(row, level, dim, slacks[r], candidates);
    codes[r * plan.num_levels] = candidates.count > 1 ? decide(row, level, dim, candidates) : candidates.codes[0];
  }
  return true;
}

// As quantize_rows, if the plan has coarse levels.
static std::int64_t coarse_tile_bytes(const Plan<float>& plan) {
  Carver carver(nullptr);
  PathTile<float>(plan, carver);
  CoarseTile(plan, carver);
  return carver.taken();
}

static void quantize_rows_coarsely(const Plan<float>& plan, std::int64_t first, std::int64_t last, char* memory) {
  Carver carver(memory);
  const PathTile<float> tile(plan, carver);
  const CoarseTile coarse_tile(plan, carver);
  quantize_tile(plan, first, last, tile, [&](std::int64_t l, std::int64_t num_rows, std::int32_t* codes) {
    for (std::int64_t r = 0; r < num_rows; r += kRows) {
      const float* rows = tile.residuals + r * plan.stride;
      const std::int64_t count = min(kRows, num_rows - r);
      std::int32_t* const their_codes = codes + r * plan.num_levels;
      if (plan.coarse[l].panels == nullptr ||
          !find_candidates(plan, plan.levels[l], plan.coarse[l], rows, count, coarse_tile, their_codes)) {
        find_codes(plan, plan.levels[l], rows, count, tile, their_codes);
      }
    }
  });
}
