// What the vector code of alignment_loss.inl reads and writes: one batch, packed by alignment_loss.cpp.
#pragma once

#include <cstdint>
#include <type_traits>

namespace h2rec {

// A block of the B x B matrix is what one task computes: its logits, and what goes into and out of them, stay in L2.
constexpr std::int64_t kBlock = 128;

struct BlockRange {
  std::int64_t row, rows, column, columns;  // columns start at a panel
};
// A row of a block, one cache line longer than it need be: walking down a column then meets every set of L1.
template <typename T>
constexpr std::int64_t kBlockStride = kBlock + 64 / sizeof(T);
// Matrices are packed in panels of this many columns (256 bytes), rows consecutive: [columns / kPanel][rows][kPanel].
template <typename T>
constexpr std::int64_t kPanel = 256 / sizeof(T);
// As wide as T, so that comparing labels gives masks for lanes of T.
template <typename T>
using Label = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>;

template <typename T>
struct AlignmentTiles {
  std::int64_t batch, dim;
  std::int64_t padded;          // batch, rounded up to whole panels
  double log2e_by_temperature;  // exp(z / temperature) = 2 ^ (z * this)
  const T* hash_rows;           // unit rows, panels of [padded, dim]
  const T* semantic_rows;
  const T* semantic_columns;  // panels of [dim, padded]
  const Label<T>* items;      // [padded]
  const Label<T>* codes;      // [levels, padded]
  std::int64_t levels;
  Label<T> min_shared_codes;  // more than levels where codes play no part
  const std::int64_t* pair_start;
  const std::int32_t* pair_column;
  const T* pair_weight;
};

// Sums of (1 - w) e and of w e, by row and by column; [padded] each. In double: what blocks add up to is not rounded again.
struct AlignmentSums {
  double *row_negative, *row_positive, *column_negative, *column_positive;
};

// What e is multiplied with where w = 0 and where w = 1: the gradient of the logit is e (row + column). [padded] each.
template <typename T>
struct AlignmentFactors {
  const T *row_negative, *row_positive, *column_negative, *column_positive;
};

}  // namespace h2rec
