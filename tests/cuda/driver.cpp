// Executes the kernels on small inputs and compares with fp64, under whatever sanitizer it is compiled with.
// Its argument is the number of the planted bug that is to be active (test_sanitized.py); 0 is none.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

static int active_bug = 0;
static bool planted(int bug) { return bug == active_bug; }

#include "residual_quantize.cu"

// Of exactly this size, so that ASan sees one element too far.
template <typename T>
std::unique_ptr<T[]> array(std::size_t size) {
  return std::unique_ptr<T[]>(new T[size]);
}

template <typename C>
bool agrees(h2rec::cuda::Dtype dtype, std::int64_t num_rows, std::int64_t dim, const std::vector<std::int64_t>& levels) {
  std::mt19937 random(static_cast<unsigned>(num_rows * 31 + dim));
  std::int64_t total = 0;
  for (const std::int64_t size : levels) {
    total += size;
  }
  const std::size_t num_levels = levels.size();
  auto x = array<C>(num_rows * dim), quantized = array<C>(num_rows * dim), codebooks = array<C>(total * dim);
  auto codes = array<std::int32_t>(num_rows * num_levels);
  // Small integers: every distance is exact, and many are tied.
  for (std::int64_t i = 0; i < num_rows * dim; ++i) {
    x[i] = static_cast<C>(static_cast<int>(random() % 9) - 4);
  }
  for (std::int64_t i = 0; i < total * dim; ++i) {
    codebooks[i] = static_cast<C>(static_cast<int>(random() % 5) - 2);
  }
  const std::int64_t bad_row = num_rows / 2;  // nobody checked that it is finite
  x[bad_row * dim] = static_cast<C>(NAN);
  const int error =
      h2rec::cuda::residual_quantize({x.get(), codebooks.get(), levels.data(), quantized.get(), codes.get(), num_rows, dim,
                                      static_cast<int>(num_levels), dtype, dim % 4 == 0},
                                     nullptr);
  if (error != 0) {
    return false;
  }
  for (std::int64_t n = 0; n < num_rows; ++n) {
    std::vector<double> residual(&x[n * dim], &x[n * dim] + dim);
    const C* codebook = codebooks.get();
    for (std::size_t l = 0; l < num_levels; ++l) {
      double nearest = INFINITY;
      std::int64_t expected = 0;
      for (std::int64_t k = 0; k < levels[l]; ++k) {
        double distance = 0;
        for (std::int64_t d = 0; d < dim; ++d) {
          distance += std::pow(residual[d] - codebook[k * dim + d], 2);
        }
        if (distance < nearest) {
          nearest = distance;
          expected = k;
        }
      }
      if (codes[n * num_levels + l] != expected) {
        return false;
      }
      for (std::int64_t d = 0; d < dim; ++d) {
        residual[d] -= codebook[expected * dim + d];
      }
      codebook += levels[l] * dim;
    }
    for (std::int64_t d = 0; d < dim; ++d) {
      const double sum = quantized[n * dim + d];
      if (n == bad_row ? !std::isnan(sum) : sum != x[n * dim + d] - residual[d]) {
        return false;
      }
    }
  }
  return true;
}

int main(int, char** arguments) {
  active_bug = std::atoi(arguments[1]);
  const auto kFloat = h2rec::cuda::Dtype::kFloat32;
  bool all = agrees<float>(kFloat, 1, 8, {5, 3});
  for (const std::int64_t dim : {3, 8, 21}) {
    all = all && agrees<float>(kFloat, 45, dim, {5, 130, 5});
  }
  all = all && agrees<double>(h2rec::cuda::Dtype::kFloat64, 33, 6, {140, 3});
  std::puts(all ? "agrees" : "DIFFERS");
  return all ? 0 : 1;
}
