#include "harmonized_embedding.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

namespace h2rec {
namespace {

using std::int64_t;

// Some columns of the output: a sum of codewords and a sum of table rows, each scaled.
struct Part {
  void* out;
  int64_t out_stride;
  int64_t width;
  int64_t first_level, last_level;
  double codebook_scale;
  int64_t num_hashes;
  int64_t table_column;
  double table_scale;
};

struct Pool {
  Rows codebooks, table;
  int64_t num_levels, num_hashes, table_dim;
  const Part* parts;
  int64_t num_parts;
};
using PoolFunction = void(const Pool& pool, const std::int32_t* codebook_rows, const int64_t* table_rows, int64_t begin,
                          int64_t end);

// sums[rows[token, level]] += grad[token, level]
struct CodewordSums {
  Rows grad;
  int64_t level_stride;
  const std::int32_t* rows;
  int64_t num_tokens, num_levels, dim;
  void* sums;
};
using AddToCodewords = void(const CodewordSums& sums, int64_t first_level, int64_t last_level, int64_t first_column,
                            int64_t last_column);

// out = sums / divisor
using RoundFunction = void(const void* sums, double divisor, int64_t count, void* out);

// out = sum of the gradients of the tokens of keys [begin, end), over divisor
struct RunSums {
  Rows grad;
  double divisor;
  int64_t dim;
  const std::uint64_t* keys;
  int64_t num_keys;
  std::uint64_t token_mask;
};
using SumRun = void(const RunSums& sums, int64_t begin, int64_t end, void* out);

}  // namespace
}  // namespace h2rec

#define H2REC_KERNEL "harmonized_embedding.inl"
#include "for_each_isa.h"

namespace h2rec {
namespace {

constexpr int64_t kGrainBytes = 2 << 20;  // what a thread must move to be worth its start
constexpr int64_t kBlock = 128;           // tokens whose rows are found, and then fetched, before they are read

int64_t size_of(FloatType type) {
  return type == FloatType::kFloat64 ? 8 : type == FloatType::kFloat32 ? 4 : 2;
}

int64_t size_of_sum(FloatType type) { return type == FloatType::kFloat64 ? 8 : 4; }

char* offset(void* base, int64_t elements, FloatType type) {
  return static_cast<char*>(base) + elements * size_of(type);
}

int64_t grain_for(int64_t bytes_each) { return std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, bytes_each)); }

// What the sums of table rows, and of codewords, are divided by.
double table_divisor(const HarmonizedEmbedding& op) { return op.combine == Combine::kMean ? 2 : 1; }

double codebook_divisor(const HarmonizedEmbedding& op) {
  return table_divisor(op) * (op.pooling == Pooling::kMean ? static_cast<double>(op.items.num_levels) : 1);
}

std::vector<Part> plan_parts(const HarmonizedEmbedding& op, void* first, void* hashed) {
  const bool added = op.combine == Combine::kSum || op.combine == Combine::kMean;
  const int64_t levels_per_part = op.pooling == Pooling::kLevels ? 1 : op.items.num_levels;
  std::vector<Part> parts;
  if (op.codebook_dim > 0) {
    for (int64_t level = 0, column = 0; level < op.items.num_levels;
         level += levels_per_part, column += op.codebook_dim) {
      parts.push_back({offset(first, column, op.type), op.first_width, op.codebook_dim, level,
                       level + levels_per_part, 1 / codebook_divisor(op), added ? op.items.num_hashes : 0, column,
                       1 / table_divisor(op)});
    }
  }
  if (op.table_dim > 0 && !added) {
    const bool apart = op.combine == Combine::kNone;
    parts.push_back({apart ? hashed : offset(first, op.first_width - op.table_dim, op.type),
                     apart ? op.table_dim : op.first_width, op.table_dim, 0, 0, 1, op.items.num_hashes, 0, 1});
  }
  return parts;
}

}  // namespace

Fault harmonized_embedding(const HarmonizedEmbedding& op, Rows codebooks, Rows table, void* first, void* hashed,
                           ParallelFor parallel_for) {
  const ItemRows& items = op.items;
  const auto pool_tokens = (*H2REC_CHOOSE(pool))[static_cast<int>(op.type)];
  const std::vector<Part> parts = plan_parts(op, first, hashed);
  const int64_t num_levels = op.codebook_dim > 0 ? items.num_levels : 0;
  const Pool pool{codebooks,    table,        num_levels, items.num_hashes, op.table_dim,
                  parts.data(), static_cast<int64_t>(parts.size())};
  const int64_t bytes_each = size_of(op.type) * (op.codebook_dim * num_levels + op.first_width +
                                                 op.table_dim * (items.num_hashes + 1));
  std::atomic<Fault> fault = Fault::kNone;
  parallel_for(0, op.num_tokens, grain_for(bytes_each), [&](int64_t begin, int64_t end) {
    const int64_t block = std::min(kBlock, end - begin);
    const auto codebook_rows = std::make_unique_for_overwrite<std::int32_t[]>(block * num_levels);
    const auto table_rows = std::make_unique_for_overwrite<int64_t[]>(block * items.num_hashes);
    for (int64_t start = begin; start < end; start += block) {
      const int64_t stop = std::min(start + block, end);
      const Fault found = find_rows(items, start, stop, codebook_rows.get(), table_rows.get());
      if (found != Fault::kNone) {
        fault = found;
      }
      pool_tokens(pool, codebook_rows.get(), table_rows.get(), start, stop);
    }
  });
  return fault;
}

HarmonizedEmbeddingBackward::HarmonizedEmbeddingBackward(const HarmonizedEmbedding& op, const void* grad_first,
                                                         const void* grad_hashed, ParallelFor parallel_for)
    : op_(op), grad_first_(grad_first), grad_hashed_(grad_hashed), parallel_for_(parallel_for) {
  const ItemRows& items = op_.items;
  const int64_t num_levels = items.sizes == nullptr ? 0 : items.num_levels;
  codebook_rows_ = std::make_unique_for_overwrite<std::int32_t[]>(op_.num_tokens * num_levels);
  const auto table_rows = std::make_unique_for_overwrite<int64_t[]>(op_.num_tokens * items.num_hashes);
  parallel_for(0, op_.num_tokens, grain_for(256), [&](int64_t begin, int64_t end) {
    // What is out of range was refused by the forward, and here gives no gradient.
    find_rows(items, begin, end, codebook_rows_.get() + begin * num_levels, table_rows.get() + begin * items.num_hashes);
  });
  if (op_.table_dim > 0) {
    sorted_ = sort_rows(table_rows.get(), op_.num_tokens, items.num_hashes, items.num_rows, parallel_for);
  }
}

HarmonizedEmbeddingBackward::Gradient HarmonizedEmbeddingBackward::of_codebooks() const {
  const int64_t level_stride = op_.pooling == Pooling::kLevels ? op_.codebook_dim : 0;
  return {{grad_first_, op_.first_width}, level_stride, codebook_divisor(op_)};
}

HarmonizedEmbeddingBackward::Gradient HarmonizedEmbeddingBackward::of_table() const {
  if (op_.combine == Combine::kNone) {
    return {{grad_hashed_, op_.table_dim}, 0, 1};
  }
  const int64_t column = op_.combine == Combine::kConcat ? op_.first_width - op_.table_dim : 0;
  const char* grad = static_cast<const char*>(grad_first_) + column * size_of(op_.type);
  return {{grad, op_.first_width}, 0, table_divisor(op_)};
}

// Each thread owns some levels, or some columns of one, and adds to them in the order of the tokens: no partial sums, and the
// same bits however the work is shared out. Levels go first: two threads that write to neighbouring columns would take each
// other's cache lines away, as processors prefetch the line beside the one that is written.
void HarmonizedEmbeddingBackward::codebooks(void* grad) const {
  const Gradient gradient = of_codebooks();
  const int64_t num_levels = op_.items.num_levels, dim = op_.codebook_dim;
  int64_t num_elements = 0;
  for (int64_t level = 0; level < num_levels; ++level) {
    num_elements += op_.items.sizes[level] * dim;
  }
  const int64_t sum_size = size_of_sum(op_.type);
  const bool in_place = sum_size == size_of(op_.type);
  std::unique_ptr<char[]> scratch;
  if (!in_place) {
    scratch = std::make_unique_for_overwrite<char[]>(num_elements * sum_size);
  }
  char* sums = in_place ? static_cast<char*>(grad) : scratch.get();
  parallel_for_(0, num_elements * sum_size, kGrainBytes,
                [&](int64_t begin, int64_t end) { std::memset(sums + begin, 0, end - begin); });

  const auto add = (*H2REC_CHOOSE(add_to_codewords))[static_cast<int>(op_.type)];
  const CodewordSums codewords{gradient.rows, gradient.level_stride, codebook_rows_.get(), op_.num_tokens, num_levels, dim,
                               sums};
  const int64_t line = 64 / sum_size;  // columns in a cache line, which no two threads should write
  const int64_t num_lines = (dim + line - 1) / line;
  parallel_for_(0, num_levels * num_lines, grain_for(op_.num_tokens * 64), [&](int64_t begin, int64_t end) {
    while (begin < end) {  // as many whole levels as there are, and the ragged ends
      const int64_t first_level = begin / num_lines, first_line = begin % num_lines;
      const bool whole = first_line == 0 && end - begin >= num_lines;
      const int64_t last_level = whole ? end / num_lines : first_level + 1;
      const int64_t last_line = whole ? num_lines : std::min(num_lines, first_line + end - begin);
      add(codewords, first_level, last_level, first_line * line, std::min(last_line * line, dim));
      begin += (last_level - first_level) * (last_line - first_line);
    }
  });

  if (!in_place || gradient.divisor != 1) {
    const auto round_sums = (*H2REC_CHOOSE(round))[static_cast<int>(op_.type)];
    parallel_for_(0, num_elements, kGrainBytes / sum_size, [&](int64_t begin, int64_t end) {
      round_sums(sums + begin * sum_size, gradient.divisor, end - begin, offset(grad, begin, op_.type));
    });
  }
}

void HarmonizedEmbeddingBackward::table(void* grad) const { sum_table(grad, true); }

void HarmonizedEmbeddingBackward::sparse_table(void* grad, int64_t* rows) const {
  std::copy(sorted_.rows.begin(), sorted_.rows.end(), rows);
  sum_table(grad, false);
}

// Each row of the result is written once: the sum of its tokens' gradients in their order, or zero. The work, tokens read
// and rows written, is shared out evenly, but no row is split.
void HarmonizedEmbeddingBackward::sum_table(void* grad, bool all_rows) const {
  const Gradient gradient = of_table();
  const int64_t num_runs = sorted_.num_rows(), num_keys = sorted_.starts.back();
  const int64_t num_outputs = all_rows ? op_.items.num_rows : num_runs;
  const auto output_of = [&](int64_t run) { return all_rows ? sorted_.rows[run] : run; };
  const auto sum = (*H2REC_CHOOSE(sum_run))[static_cast<int>(op_.type)];
  const RunSums sums{gradient.rows, gradient.divisor, op_.table_dim,
                     sorted_.keys.get(), num_keys,  (std::uint64_t{1} << sorted_.token_bits) - 1};

  const auto first_run_from = [&](int64_t output) {
    if (!all_rows) {
      return output;
    }
    return std::lower_bound(sorted_.rows.begin(), sorted_.rows.end(), output) - sorted_.rows.begin();
  };
  const auto first_output_after = [&](int64_t work) {  // the least output that has so much work before it
    int64_t low = 0, high = num_outputs;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (middle + sorted_.starts[first_run_from(middle)] < work) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  };
  const auto clear = [&](int64_t first, int64_t last) {
    std::memset(offset(grad, first * op_.table_dim, op_.type), 0, (last - first) * op_.table_dim * size_of(op_.type));
  };
  parallel_for_(0, num_outputs + num_keys, grain_for(op_.table_dim * size_of(op_.type)), [&](int64_t begin, int64_t end) {
    int64_t output = first_output_after(begin);
    const int64_t last = end == num_outputs + num_keys ? num_outputs : first_output_after(end);
    for (int64_t run = first_run_from(output); run < num_runs && output_of(run) < last; ++run) {
      clear(output, output_of(run));
      output = output_of(run);
      sum(sums, sorted_.starts[run], sorted_.starts[run + 1], offset(grad, output * op_.table_dim, op_.type));
      ++output;
    }
    clear(output, std::max(output, last));
  });
}

}  // namespace h2rec
