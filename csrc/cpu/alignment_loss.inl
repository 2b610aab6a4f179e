// One block of logits: its exponentials summed (forward), or turned into gradients of the rows and columns (backward).

template <typename T>
struct Lanes {
  static constexpr int kCount = kVectorBytes / sizeof(T);
  typedef T Vector __attribute__((vector_size(kVectorBytes)));
  typedef Label<T> Mask __attribute__((vector_size(kVectorBytes)));
  typedef T Unaligned __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias));
  typedef Label<T> UnalignedMask __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias));
};

template <typename T>
inline typename Lanes<T>::Vector load(const T* from) {
  return *reinterpret_cast<const typename Lanes<T>::Unaligned*>(from);
}

template <typename T>
inline void store(T* to, typename Lanes<T>::Vector x) {
  *reinterpret_cast<typename Lanes<T>::Unaligned*>(to) = x;
}

template <typename T>
inline typename Lanes<T>::Mask load_labels(const Label<T>* from) {
  return *reinterpret_cast<const typename Lanes<T>::UnalignedMask*>(from);
}

template <typename T>
inline double sum_of(typename Lanes<T>::Vector x) {
  double sum = 0;
  for (int lane = 0; lane < Lanes<T>::kCount; ++lane) {
    sum += x[lane];
  }
  return sum;
}

// ---- products ----

// The tile of c that the registers hold: kRows x kVectors sums, and room for a row of b and an element of a.
constexpr int kTileRows = 6;
constexpr int kTileVectors = kVectorBytes == 64 ? 4 : 2;

// c [kRows, kVectors] (+)= a [kRows, depth] b [depth, kVectors], b being part of a panel.
template <typename T, int kRows, int kVectors>
inline void multiply_tile(T* c, std::int64_t c_row, const T* a, std::int64_t a_row, std::int64_t a_column, const T* b,
                          std::int64_t depth, bool accumulate) {
  using Vector = typename Lanes<T>::Vector;
  constexpr int kLanes = Lanes<T>::kCount;
  Vector sums[kRows][kVectors] = {};
  for (std::int64_t k = 0; k < depth; ++k) {
    Vector row[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      row[v] = load(b + k * kPanel<T> + v * kLanes);
    }
    for (int i = 0; i < kRows; ++i) {
      const T factor = a[i * a_row + k * a_column];
      for (int v = 0; v < kVectors; ++v) {
        sums[i][v] += factor * row[v];
      }
    }
  }
  // What is in c comes last: a large sum would round each small product away.
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < kVectors; ++v) {
      T* to = c + i * c_row + v * kLanes;
      store(to, accumulate ? load(to) + sums[i][v] : sums[i][v]);
    }
  }
}

// c [rows, columns] (+)= a [rows, depth] b [depth, columns]: b is a panel, columns are rounded up to whole vectors.
template <typename T>
void multiply(T* c, std::int64_t c_row, const T* a, std::int64_t a_row, std::int64_t a_column, const T* b,
              std::int64_t rows, std::int64_t columns, std::int64_t depth, bool accumulate) {
  constexpr int kLanes = Lanes<T>::kCount;
  std::int64_t j = 0;
  const auto tile = [&]<int kVectors>() {
    std::int64_t i = 0;
    for (; i + kTileRows <= rows; i += kTileRows) {
      multiply_tile<T, kTileRows, kVectors>(c + i * c_row + j, c_row, a + i * a_row, a_row, a_column, b + j, depth,
                                            accumulate);
    }
    for (; i < rows; ++i) {
      multiply_tile<T, 1, kVectors>(c + i * c_row + j, c_row, a + i * a_row, a_row, a_column, b + j, depth, accumulate);
    }
    j += kVectors * kLanes;
  };
  while (j + (kTileVectors - 1) * kLanes < columns) {
    tile.template operator()<kTileVectors>();
  }
  while (j < columns) {
    tile.template operator()<1>();
  }
}

// logits [rows, columns] at (row, column) of the batch, times temperature.
template <typename T>
void multiply_logits(const AlignmentTiles<T>& tiles, std::int64_t row, std::int64_t column, std::int64_t rows,
                     std::int64_t columns, T* logits) {
  for (std::int64_t j = 0; j < columns; j += kPanel<T>) {
    for (std::int64_t d = 0; d < tiles.dim; d += kPanel<T>) {
      multiply(logits + j, kBlockStride<T>, tiles.hash_rows + d * tiles.padded + row * kPanel<T>, kPanel<T>, 1,
               tiles.semantic_columns + (column + j) * tiles.dim + d * kPanel<T>, rows,
               columns - j < kPanel<T> ? columns - j : kPanel<T>,
               tiles.dim - d < kPanel<T> ? tiles.dim - d : kPanel<T>, d > 0);
    }
  }
}

// grad (panels, at row `to`) += the block [rows, depth], element (i, k) at i * by_row + k * by_column, times the rows of x
// from `from` on.
template <typename T>
void add_products(const AlignmentTiles<T>& tiles, const T* block, std::int64_t by_row, std::int64_t by_column, const T* x,
                  std::int64_t from, std::int64_t depth, T* grad, std::int64_t to, std::int64_t rows) {
  for (std::int64_t d = 0; d < tiles.dim; d += kPanel<T>) {
    multiply(grad + d * tiles.padded + to * kPanel<T>, kPanel<T>, block, by_row, by_column,
             x + d * tiles.padded + from * kPanel<T>, rows, tiles.dim - d < kPanel<T> ? tiles.dim - d : kPanel<T>, depth,
             true);
  }
}

// ---- elements ----

constexpr double power_of_ln2_by_factorial(int k) {
  double value = 1;
  for (int i = 1; i <= k; ++i) {
    value *= 0.69314718055994530942 / i;
  }
  return value;
}

// 2 ^ (x (high + low)) for results in the normal range: whole part by rounding, the rest by its power series.
template <typename T>
inline typename Lanes<T>::Vector exp2_of_product(typename Lanes<T>::Vector x, T high, T low) {
  using Vector = typename Lanes<T>::Vector;
  using Mask = typename Lanes<T>::Mask;
  constexpr bool kIsFloat = sizeof(T) == 4;
  constexpr int kMantissaBits = kIsFloat ? 23 : 52, kTerms = kIsFloat ? 7 : 13;
  constexpr T kRound = 1.5 * (std::int64_t{1} << kMantissaBits);  // a sum with it has no room for a fraction
  const Vector rounded = x * high + kRound;
  const Vector fraction = (x * high - (rounded - kRound)) + x * low;
  Vector power = Vector{} + T(power_of_ln2_by_factorial(kTerms));
#pragma GCC unroll 16
  for (int k = kTerms - 1; k >= 0; --k) {
    power = power * fraction + T(power_of_ln2_by_factorial(k));
  }
  return (Vector)((Mask)power + ((Mask)rounded << kMantissaBits));
}

template <typename T>
struct Block : BlockRange {
  const AlignmentTiles<T>& tiles;
  T logits[kBlock * kBlockStride<T>];

  Block(const AlignmentTiles<T>& all, const BlockRange& range) : BlockRange(range), tiles(all) {
    multiply_logits(tiles, row, column, rows, columns, logits);
  }
};

constexpr int kGroup = 4;

// Calls element(i, j, e, w) for kRows rows of a block from `first` on and each vector of columns, e being the exponential
// and w the weight; next(j) when the vector is done.
template <typename T, int kRows, typename Element, typename Next>
inline void for_each_element(const Block<T>& block, std::int64_t first, const T* weights, Element element, Next next) {
  using Vector = typename Lanes<T>::Vector;
  using Mask = typename Lanes<T>::Mask;
  const AlignmentTiles<T>& tiles = block.tiles;
  const T high = T(tiles.log2e_by_temperature), low = T(tiles.log2e_by_temperature - high);
  const T* logits = block.logits + first * kBlockStride<T>;
  for (std::int64_t j = 0; j < block.columns; j += Lanes<T>::kCount) {
    Mask shared[kRows] = {};
    for (std::int64_t level = 0; level < tiles.levels; ++level) {
      const Label<T>* codes = tiles.codes + level * tiles.padded;
      const Mask column_codes = load_labels<T>(codes + block.column + j);
      for (int i = 0; i < kRows; ++i) {
        shared[i] += codes[block.row + first + i] == column_codes;  // true is -1
      }
    }
    const Mask column_items = load_labels<T>(tiles.items + block.column + j);
    for (int i = 0; i < kRows; ++i) {
      const Mask positive =
          (tiles.items[block.row + first + i] == column_items) | (shared[i] <= -tiles.min_shared_codes);
      const Vector weight = positive ? Vector{} + 1 : load(weights + i * kBlock + j);
      element(i, j, exp2_of_product<T>(load(logits + i * kBlockStride<T> + j), high, low), weight);
    }
    next(j);
  }
}

// First of the given pairs of `row` whose column is at least `column`.
template <typename T>
std::int64_t find_pair(const AlignmentTiles<T>& tiles, std::int64_t row, std::int64_t column) {
  std::int64_t low = tiles.pair_start[row], high = tiles.pair_start[row + 1];
  while (low < high) {
    const std::int64_t middle = (low + high) / 2;
    if (tiles.pair_column[middle] < column) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Writes the weights of the given pairs in row `i` of the block to weights [kBlock], or zeros over them.
template <typename T>
void write_weights(const Block<T>& block, std::int64_t i, T* weights, bool zeros) {
  const AlignmentTiles<T>& tiles = block.tiles;
  if (tiles.pair_start == nullptr) {
    return;
  }
  const std::int64_t row = block.row + i;
  for (std::int64_t pair = find_pair(tiles, row, block.column);
       pair < tiles.pair_start[row + 1] && tiles.pair_column[pair] < block.column + block.columns; ++pair) {
    weights[tiles.pair_column[pair] - block.column] = zeros ? T(0) : tiles.pair_weight[pair];
  }
}

// Calls rows.visit<count>(first, weights) on all rows of the block, kGroup at a time: labels and sums of columns are then
// loaded once for all of them. weights [count, kBlock] are those of the given pairs.
template <typename T, typename Rows>
void for_each_row(const Block<T>& block, Rows& rows) {
  T weights[kGroup * kBlock] = {};
  for (std::int64_t first = 0; first < block.rows;) {
    const int count = block.rows - first < kGroup ? 1 : kGroup;
    for (int i = 0; i < count; ++i) {
      write_weights(block, first + i, weights + i * kBlock, false);
    }
    if (count == kGroup) {
      rows.template visit<kGroup>(first, weights);
    } else {
      rows.template visit<1>(first, weights);
    }
    for (int i = 0; i < count; ++i) {
      write_weights(block, first + i, weights + i * kBlock, true);
    }
    first += count;
  }
}

// ---- forward ----

template <typename T>
struct SumRows {
  using Vector = typename Lanes<T>::Vector;
  using Mask = typename Lanes<T>::Mask;
  const Block<T>& block;
  const AlignmentSums& sums;
  T column_negative[kBlock] = {}, column_positive[kBlock] = {};

  template <int kRows>
  void visit(std::int64_t first, const T* weights) {
    Vector negative[kRows] = {}, positive[kRows] = {};
    Vector down_negative{}, down_positive{};
    Mask lane;
    for (int k = 0; k < Lanes<T>::kCount; ++k) {
      lane[k] = k;
    }
    for_each_element<T, kRows>(
        block, first, weights,
        [&](int i, std::int64_t j, Vector e, Vector weight) {
          e = lane < Label<T>(block.columns - j) ? e : Vector{};  // columns beyond the batch
          const Vector by_weight = weight * e, rest = (1 - weight) * e;
          positive[i] += by_weight;
          negative[i] += rest;
          down_positive += by_weight;
          down_negative += rest;
        },
        [&](std::int64_t j) {
          store(column_positive + j, load(column_positive + j) + down_positive);
          store(column_negative + j, load(column_negative + j) + down_negative);
          down_positive = down_negative = Vector{};
        });
    for (int i = 0; i < kRows; ++i) {
      sums.row_positive[block.row + first + i] += sum_of<T>(positive[i]);
      sums.row_negative[block.row + first + i] += sum_of<T>(negative[i]);
    }
  }
};

template <typename T>
void alignment_block(const AlignmentTiles<T>& tiles, const BlockRange& range, const AlignmentSums& sums) {
  const Block<T> block(tiles, range);
  SumRows<T> rows{block, sums};
  for_each_row(block, rows);
  for (std::int64_t j = 0; j < block.columns; ++j) {
    sums.column_positive[block.column + j] += rows.column_positive[j];
    sums.column_negative[block.column + j] += rows.column_negative[j];
  }
}

// ---- backward ----

template <typename T>
struct GradRows {
  using Vector = typename Lanes<T>::Vector;
  Block<T>& block;
  const AlignmentFactors<T>& factors;

  template <int kRows>
  void visit(std::int64_t first, const T* weights) {
    const std::int64_t row = block.row + first, column = block.column;
    T* grad = block.logits + first * kBlockStride<T>;
    for_each_element<T, kRows>(
        block, first, weights,
        [&](int i, std::int64_t j, Vector e, Vector weight) {
          const Vector positive = factors.row_positive[row + i] + load(factors.column_positive + column + j);
          const Vector negative = factors.row_negative[row + i] + load(factors.column_negative + column + j);
          store(grad + i * kBlockStride<T> + j, e * (weight * positive + (1 - weight) * negative));
        },
        [](std::int64_t) {});
  }
};

// Adds the block's part of the gradients of the unit rows, times temperature; panels of [padded, dim], or null.
template <typename T>
void alignment_backward_block(const AlignmentTiles<T>& tiles, const BlockRange& range, const AlignmentFactors<T>& factors,
                              T* grad_hash, T* grad_semantic) {
  Block<T> block(tiles, range);
  GradRows<T> rows{block, factors};
  for_each_row(block, rows);
  if (grad_hash != nullptr) {
    add_products(tiles, block.logits, kBlockStride<T>, 1, tiles.semantic_rows, block.column, block.columns, grad_hash,
                 block.row, block.rows);
  }
  if (grad_semantic != nullptr) {
    add_products(tiles, block.logits, 1, kBlockStride<T>, tiles.hash_rows, block.row, block.rows, grad_semantic,
                 block.column, block.columns);
  }
}
