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
    for_each_row([&](std::int64_t i) {
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

  // Calls visit(first row, first column) for every block, in rounds: in one round no two blocks share a row or a column, so
  // each may add to what belongs to its rows and its columns. Sums come out in the order of the rounds, whatever the
  // number of threads.
  template <typename Visit>
  void for_each_block(Visit visit) const {
    const std::int64_t blocks = round_up(inputs_.batch, kBlock) / kBlock;
    for (std::int64_t round = 0; round < blocks; ++round) {
      parallel_for_(0, blocks, 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) {
          visit(i * kBlock, (i + round) % blocks * kBlock);
        }
      });
    }
  }

  // Gradients of the rows from those of the unit rows, times temperature. Returns the sum of z (d loss / d z).
  double unit_backward(Panels<T>& grad_hash_rows, Panels<T>& grad_semantic_rows, T* grad_hash, T* grad_semantic) {
    std::vector<double> along(inputs_.batch);
    for_each_row([&](std::int64_t i) {
      along[i] = unit_row_backward(hash_rows_, grad_hash_rows, i, hash_norms_[i], grad_hash);
      unit_row_backward(semantic_rows_, grad_semantic_rows, i, semantic_norms_[i], grad_semantic);
    });
    double sum = 0;
    for (const double part : along) {
      sum += part;
    }
    return sum;
  }

  std::int64_t padded() const { return padded_; }

 private:
  template <typename Visit>
  void for_each_row(Visit visit) const {
    parallel_for_(0, inputs_.batch, kPanel<T>, [&](std::int64_t begin, std::int64_t end) {
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
      grad[i * inputs_.dim + d] = T((grad_unit(i, d) - along * unit(i, d)) / (norm * inputs_.temperature));
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
void alignment_loss(const AlignmentInputs<T>& inputs, T* losses, T* statistics, ParallelFor parallel_for) {
  Batch<T> packed(inputs, parallel_for);
  const AlignmentTiles<T> tiles = packed.tiles();
  std::vector<double> storage(4 * packed.padded());
  const auto part = [&](int k) { return storage.data() + k * packed.padded(); };
  const AlignmentSums sums{part(0), part(1), part(2), part(3)};
  const auto block = H2REC_CHOOSE(alignment_block<T>);
  packed.for_each_block([&](std::int64_t row, std::int64_t column) { block(tiles, row, column, sums); });
  const std::int64_t batch = inputs.batch;
  for (std::int64_t i = 0; i < batch; ++i) {
    // log(1 + N / P) is exact also where the loss is near 0, which the difference of two logarithms would not be.
    const double row_loss = std::log1p(sums.row_negative[i] / sums.row_positive[i]);
    const double column_loss = std::log1p(sums.column_negative[i] / sums.column_positive[i]);
    losses[i] = T((row_loss + column_loss) / 2);
    statistics[i] = T(std::log(sums.row_positive[i]));
    statistics[batch + i] = T(row_loss);
    statistics[2 * batch + i] = T(std::log(sums.column_positive[i]));
    statistics[3 * batch + i] = T(column_loss);
  }
}

template <typename T>
double alignment_loss_backward(const AlignmentInputs<T>& inputs, const T* grad_losses, const T* statistics, T* grad_hash,
                               T* grad_semantic, ParallelFor parallel_for) {
  Batch<T> packed(inputs, parallel_for);
  const AlignmentTiles<T> tiles = packed.tiles();
  const std::int64_t batch = inputs.batch, padded = packed.padded();
  std::vector<T> storage(4 * padded);
  // e / R - w e / P, with log R = log P + loss: 1 / R - w / P is written so that nothing cancels where the loss is near 0.
  const auto write_factors = [&](const T* log_p, const T* loss, T* negative, T* positive) {
    for (std::int64_t i = 0; i < batch; ++i) {
      negative[i] = T(grad_losses[i] / 2 * std::exp(-double(log_p[i]) - loss[i]));
      positive[i] = T(grad_losses[i] / 2 * std::exp(-double(log_p[i])) * std::expm1(-double(loss[i])));
    }
  };
  T* const parts = storage.data();
  write_factors(statistics, statistics + batch, parts, parts + padded);
  write_factors(statistics + 2 * batch, statistics + 3 * batch, parts + 2 * padded, parts + 3 * padded);
  const AlignmentFactors<T> factors{parts, parts + padded, parts + 2 * padded, parts + 3 * padded};
  Panels<T> grad_hash_rows(padded, inputs.dim), grad_semantic_rows(padded, inputs.dim);
  const auto block = H2REC_CHOOSE(alignment_backward_block<T>);
  packed.for_each_block([&](std::int64_t row, std::int64_t column) {
    block(tiles, row, column, factors, grad_hash_rows.data(), grad_semantic_rows.data());
  });
  return -packed.unit_backward(grad_hash_rows, grad_semantic_rows, grad_hash, grad_semantic) / inputs.temperature;
}

template void alignment_loss(const AlignmentInputs<float>&, float*, float*, ParallelFor);
template void alignment_loss(const AlignmentInputs<double>&, double*, double*, ParallelFor);
template double alignment_loss_backward(const AlignmentInputs<float>&, const float*, const float*, float*, float*,
                                        ParallelFor);
template double alignment_loss_backward(const AlignmentInputs<double>&, const double*, const double*, double*, double*,
                                        ParallelFor);

}  // namespace h2rec
