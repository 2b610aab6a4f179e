// Which tokens read which row of a table: what a gradient of the table is summed by.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "parallel.h"

namespace h2rec {

// Row rows[i] is read by the tokens token(j) for j in [starts[i], starts[i + 1]), in ascending order; rows ascend.
struct SortedRows {
  std::unique_ptr<std::uint64_t[]> keys;  // row in the high bits, token in the low ones
  int token_bits;
  std::vector<std::int64_t> rows;
  std::vector<std::int64_t> starts;

  std::int64_t num_rows() const { return static_cast<std::int64_t>(rows.size()); }
};

// From the rows [num_tokens, rows_per_token] that the tokens read, each in [0, limit), or kNoRow, which is left out.
// The result does not depend on the number of threads.
SortedRows sort_rows(const std::int64_t* rows, std::int64_t num_tokens, std::int64_t rows_per_token, std::int64_t limit,
                     ParallelFor parallel_for);

}  // namespace h2rec
