// The code-guided contrastive loss on the CPU, forward and backward, in tiles; csrc/README.md tells how.
#pragma once

#include <cstdint>

#include "parallel.h"

namespace h2rec {

// T is float or double: what the inputs hold, and what is computed in. With float, 1 / temperature is at most 64; with
// double, at most 600: up to there no exponential, and no sum of them, leaves the range of T.
template <typename T>
struct AlignmentInputs {
  const T* hash_emb;  // [batch, dim]
  const T* semantic_emb;
  std::int64_t batch, dim;
  double temperature;
  const std::int32_t* items;  // [batch], or null: no two are equal
  const std::int32_t* codes;  // [levels, batch]
  std::int64_t levels, min_shared_codes;
  // Positives by weight: row i has the columns pair_column[pair_start[i] .. pair_start[i + 1]), ascending. Or null.
  const std::int64_t* pair_start;  // [batch + 1]
  const std::int32_t* pair_column;
  const T* pair_weight;
  // The rows of hash_emb to sum over or, backward, the rows of both to give gradients of.
  std::int64_t first_row, num_rows;
};

// Logarithms of sums of w e (positives) and of (1 - w) e: row_sums [2, num_rows], column_sums [2, batch] over these rows.
template <typename T>
void alignment_loss(const AlignmentInputs<T>& inputs, double* row_sums, double* column_sums, ParallelFor parallel_for);

// Of the whole batch, [2, batch] each.
struct AlignmentLogSums {
  const double *grad_row_sums, *grad_column_sums, *row_sums, *column_sums;
};

// grad_hash, grad_semantic [num_rows, dim]; returns what the rows add to the gradient of the temperature. The same bits for
// any number of threads.
template <typename T>
double alignment_loss_backward(const AlignmentInputs<T>& inputs, const AlignmentLogSums& sums, T* grad_hash,
                               T* grad_semantic, ParallelFor parallel_for);

}  // namespace h2rec
