// Packs a batch, walks its blocks, and turns sums into losses and factors into gradients.
#include "alignment_loss.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "alignment_tiles.h"

#define H2REC_KERNEL "alignment_loss.inl"
#include "for_each_isa.h"

namespace h2rec {
namespace {

constexpr double kMinNorm = 1e-12, kLog2e = 1.44269504088896340736;

std::int64_t round_up(std::int64_t n, std::int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// A matrix in panels, zero where it is padded.
template <typename T>
class Panels {
 public:
  Panels(std::int64_t rows, std::int64_t columns) : rows_(rows), values_(rows * round_up(columns, kPanel<T>)) {}
  T& operator()(std::int64_t row, std::int64_t column) {
    return values_[(column / kPanel<T> * rows_ + row) * kPanel<T> + column % kPanel<T>];
  }
  T* data() { return values_.data(); }

 private:
  std::int64_t rows_;
  std::vector<T> values_;
};

template <typename T>
class Batch {
 public:
  Batch(const AlignmentInputs<T>& inputs, ParallelFor parallel_for)
      : inputs_(inputs),
        parallel_for_(parallel_for),
        padded_(round_up(inputs.batch, kPanel<T>)),
        hash_rows_(padded_, inputs.dim),
        semantic_rows_(padded_, inputs.dim),
        semantic_columns_(inputs.dim, padded_),
        hash_norms_(inputs.batch),
        semantic_norms_(inputs.batch),
        items_(padded_),
        codes_(inputs.levels * padded_) {
    const std::int64_t batch = inputs.batch;
    for_each_row(0, batch, [&](std::int64_t i) {
      hash_norms_[i] = pack_unit_row(inputs.hash_emb, i, hash_rows_);
      semantic_norms_[i] = pack_unit_row(inputs.semantic_emb, i, semantic_rows_);
      for (std::int64_t d = 0; d < inputs.dim; ++d) {
        semantic_columns_(d, i) = semantic_rows_(i, d);
      }
    });
    for (std::int64_t i = 0; i < batch; ++i) {
      items_[i] = inputs.items != nullptr ? inputs.items[i] : i;
    }
    for (std::int64_t level = 0; level < inputs.levels; ++level) {
      std::copy_n(inputs.codes + level * batch, batch, codes_.begin() + level * padded_);
    }
  }

  AlignmentTiles<T> tiles() {
    return {.batch = inputs_.batch,
            .dim = inputs_.dim,
            .padded = padded_,
            .log2e_by_temperature = kLog2e / inputs_.temperature,
            .hash_rows = hash_rows_.data(),
            .semantic_rows = semantic_rows_.data(),
            .semantic_columns = semantic_columns_.data(),
            .items = items_.data(),
            .codes = codes_.data(),
            .levels = inputs_.levels,
            .min_shared_codes = Label<T>(inputs_.levels > 0 ? inputs_.min_shared_codes : 1),
            .pair_start = inputs_.pair_start,
            .pair_column = inputs_.pair_column,
            .pair_weight = inputs_.pair_weight};
  }

  // Calls visit(block) for every block of rows [row, row_end) and columns [column, column_end), in rounds: in one round no
  // two blocks share a row or a column, so each may add to what belongs to its rows and its columns. Sums come out in the
  // order of the rounds, whatever the number of threads.
  template <typename Visit>
  void for_each_block(std::int64_t row, std::int64_t row_end, std::int64_t column, std::int64_t column_end,
                      Visit visit) const {
    const std::int64_t high = blocks_in(row, row_end), wide = blocks_in(column, column_end);
    for (std::int64_t round = 0; round < std::max(high, wide); ++round) {
      parallel_for_(0, std::min(high, wide), 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t k = begin; k < end; ++k) {
          const std::int64_t i = row + (high <= wide ? k : (k + round) % high) * kBlock;
          const std::int64_t j = column + (high <= wide ? (k + round) % wide : k) * kBlock;
          visit(BlockRange{i, std::min(kBlock, row_end - i), j, std::min(kBlock, column_end - j)});
        }
      });
    }
  }

  // Gradients of the rows from those of the unit rows, times temperature. Returns the sum of z (d loss / d z).
  double unit_backward(Panels<T>& grad_hash_rows, Panels<T>& grad_semantic_rows, T* grad_hash, T* grad_semantic) {
    std::vector<double> along(inputs_.num_rows);
    for_each_row(inputs_.first_row, inputs_.first_row + inputs_.num_rows, [&](std::int64_t i) {
      const std::int64_t out = i - inputs_.first_row;
      along[out] = unit_row_backward(hash_rows_, grad_hash_rows, i, hash_norms_[i], grad_hash + out * inputs_.dim);
      unit_row_backward(semantic_rows_, grad_semantic_rows, i, semantic_norms_[i], grad_semantic + out * inputs_.dim);
    });
    double sum = 0;
    for (const double part : along) {
      sum += part;
    }
    return sum;
  }

  std::int64_t padded() const { return padded_; }

 private:
  static std::int64_t blocks_in(std::int64_t begin, std::int64_t end) { return round_up(end - begin, kBlock) / kBlock; }

  template <typename Visit>
  void for_each_row(std::int64_t first, std::int64_t last, Visit visit) const {
    parallel_for_(first, last, kPanel<T>, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        visit(i);
      }
    });
  }

  // Returns the norm: infinite for a row that counts as zero, whose gradient then vanishes. Scaled by a power of two
  // first, so that no square overflows.
  double pack_unit_row(const T* x, std::int64_t i, Panels<T>& rows) const {
    const T* row = x + i * inputs_.dim;
    T largest = 0;
    for (std::int64_t d = 0; d < inputs_.dim; ++d) {
      largest = std::max(largest, std::abs(row[d]));
    }
    int exponent;
    std::frexp(largest, &exponent);
    const double scale = std::ldexp(1.0, std::clamp(-exponent, -1000, 1000));
    double square = 0;
    for (std::int64_t d = 0; d < inputs_.dim; ++d) {
      square += row[d] * scale * (row[d] * scale);
    }
    const double length = std::sqrt(square), norm = length / scale;
    if (norm < kMinNorm) {
      return std::numeric_limits<double>::infinity();
    }
    for (std::int64_t d = 0; d < inputs_.dim; ++d) {
      rows(i, d) = T(row[d] * scale / length);
    }
    return norm;
  }

  // Returns the part of the gradient that lies along the unit row.
  double unit_row_backward(Panels<T>& unit, Panels<T>& grad_unit, std::int64_t i, double norm, T* grad) const {
    double along = 0;
    for (std::int64_t d = 0; d < inputs_.dim; ++d) {
      along += double(unit(i, d)) * grad_unit(i, d);
    }
    for (std::int64_t d = 0; d < inputs_.dim; ++d) {
      grad[d] = T((grad_unit(i, d) - along * unit(i, d)) / (norm * inputs_.temperature));
    }
    return along / inputs_.temperature;
  }

  const AlignmentInputs<T>& inputs_;
  ParallelFor parallel_for_;
  std::int64_t padded_;
  Panels<T> hash_rows_, semantic_rows_, semantic_columns_;
  std::vector<double> hash_norms_, semantic_norms_;
  std::vector<Label<T>> items_, codes_;
};

}  // namespace

template <typename T>
void alignment_loss(const AlignmentInputs<T>& inputs, double* row_sums, double* column_sums, ParallelFor parallel_for) {
  Batch<T> packed(inputs, parallel_for);
  const AlignmentTiles<T> tiles = packed.tiles();
  std::vector<double> storage(4 * packed.padded());
  const auto part = [&](int k) { return storage.data() + k * packed.padded(); };
  const AlignmentSums sums{part(0), part(1), part(2), part(3)};
  const auto block = H2REC_CHOOSE(alignment_block<T>);
  const std::int64_t first = inputs.first_row, rows = inputs.num_rows, batch = inputs.batch;
  packed.for_each_block(first, first + rows, 0, batch, [&](const BlockRange& range) { block(tiles, range, sums); });
  for (std::int64_t i = 0; i < rows; ++i) {
    row_sums[i] = std::log(sums.row_positive[first + i]);
    row_sums[rows + i] = std::log(sums.row_negative[first + i]);
  }
  for (std::int64_t j = 0; j < batch; ++j) {
    column_sums[j] = std::log(sums.column_positive[j]);
    column_sums[batch + j] = std::log(sums.column_negative[j]);
  }
}

template <typename T>
double alignment_loss_backward(const AlignmentInputs<T>& inputs, const AlignmentLogSums& sums, T* grad_hash,
                               T* grad_semantic, ParallelFor parallel_for) {
  Batch<T> packed(inputs, parallel_for);
  const AlignmentTiles<T> tiles = packed.tiles();
  const std::int64_t batch = inputs.batch, padded = packed.padded();
  std::vector<T> storage(4 * padded);
  const auto factors_of = [&](const double* grad, const double* log_sum, T* factors) {
    for (std::int64_t i = 0; i < batch; ++i) {
      // Where a sum is empty, nothing is divided by it.
      factors[i] = std::isinf(log_sum[i]) ? T(0) : T(grad[i] * std::exp(-log_sum[i]));
    }
    return factors;
  };
  T* const parts = storage.data();
  const AlignmentFactors<T> factors{
      .row_negative = factors_of(sums.grad_row_sums + batch, sums.row_sums + batch, parts),
      .row_positive = factors_of(sums.grad_row_sums, sums.row_sums, parts + padded),
      .column_negative = factors_of(sums.grad_column_sums + batch, sums.column_sums + batch, parts + 2 * padded),
      .column_positive = factors_of(sums.grad_column_sums, sums.column_sums, parts + 3 * padded)};
  Panels<T> grad_hash_rows(padded, inputs.dim), grad_semantic_rows(padded, inputs.dim);
  const auto block = H2REC_CHOOSE(alignment_backward_block<T>);
  const auto walk = [&](std::int64_t row, std::int64_t row_end, std::int64_t column, std::int64_t column_end, T* to_hash,
                        T* to_semantic) {
    packed.for_each_block(row, row_end, column, column_end, [&](const BlockRange& range) {
      block(tiles, range, factors, to_hash, to_semantic);
    });
  };
  const std::int64_t first = inputs.first_row, end = first + inputs.num_rows;
  if (inputs.num_rows == batch) {
    walk(0, batch, 0, batch, grad_hash_rows.data(), grad_semantic_rows.data());
  } else {
    walk(first, end, 0, batch, grad_hash_rows.data(), nullptr);
    walk(0, batch, first / kPanel<T> * kPanel<T>, end, nullptr, grad_semantic_rows.data());
  }
  return -packed.unit_backward(grad_hash_rows, grad_semantic_rows, grad_hash, grad_semantic) / inputs.temperature;
}

template void alignment_loss(const AlignmentInputs<float>&, double*, double*, ParallelFor);
template void alignment_loss(const AlignmentInputs<double>&, double*, double*, ParallelFor);
template double alignment_loss_backward(const AlignmentInputs<float>&, const AlignmentLogSums&, float*, float*, ParallelFor);
template double alignment_loss_backward(const AlignmentInputs<double>&, const AlignmentLogSums&, double*, double*,
                                        ParallelFor);

}  // namespace h2rec
