// Item ids to semantic and hash embeddings, and their gradients; without torch. csrc/README.md has the costs.
#pragma once

#include <cstdint>
#include <memory>

#include "floating.h"
#include "item_rows.h"
#include "parallel.h"
#include "sorted_rows.h"

namespace h2rec {

enum class Pooling { kSum, kMean, kLevels };  // kLevels: one codeword after the other, which is "concat" as well

enum class Combine { kNone, kSum, kMean, kConcat };

struct HarmonizedEmbedding {
  ItemRows items;
  std::int64_t num_tokens;
  FloatType type;
  Pooling pooling;
  Combine combine;
  std::int64_t codebook_dim;  // 0 without codebooks
  std::int64_t table_dim;     // 0 without a table
  std::int64_t first_width;   // elements of the first output for each token
};

// Rows of contiguous elements, `stride` elements apart.
struct Rows {
  const void* data;
  std::int64_t stride;
};

// Writes `first`, the semantic or the combined embeddings, and `hashed`, which is not used when they are combined. Where an
// item or a code is out of range the output is zero, and the result says so.
Fault harmonized_embedding(const HarmonizedEmbedding& op, Rows codebooks, Rows table, void* first, void* hashed,
                           ParallelFor parallel_for);

// The gradients, from those of `first` and `hashed`: the same bits for any number of threads.
class HarmonizedEmbeddingBackward {
 public:
  // Finds the rows of all tokens, and with a table (table_dim > 0) sorts the tokens by its rows.
  HarmonizedEmbeddingBackward(const HarmonizedEmbedding& op, const void* grad_first, const void* grad_hashed,
                              ParallelFor parallel_for);

  void codebooks(void* grad) const;  // [sum of sizes, codebook_dim]
  void table(void* grad) const;      // [num_rows, table_dim]

  // The rows that are read, in ascending order, and their gradients.
  std::int64_t num_read_rows() const { return sorted_.num_rows(); }
  void sparse_table(void* grad, std::int64_t* rows) const;  // [num_read_rows, table_dim], [num_read_rows]

 private:
  struct Gradient {  // of the rows that a token reads
    Rows rows;
    std::int64_t level_stride;  // between those of two levels
    double divisor;             // of their sum
  };

  Gradient of_codebooks() const;
  Gradient of_table() const;
  void sum_table(void* grad, bool all_rows) const;

  HarmonizedEmbedding op_;
  const void* grad_first_;
  const void* grad_hashed_;
  ParallelFor parallel_for_;
  std::unique_ptr<std::int32_t[]> codebook_rows_;  // [T, L]
  SortedRows sorted_;
};

}  // namespace h2rec
