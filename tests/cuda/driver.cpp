// Executes the kernels on small inputs and compares with fp64, under whatever sanitizer it is compiled with.
// Its argument is the number of the planted bug that is to be active (test_sanitized.py); 0 is none.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <tuple>
#include <vector>

static int active_bug = 0;
static bool planted(int bug) { return bug == active_bug; }

#include "residual_quantize.cu"

using h2rec::cuda::Dtype;

struct Case {
  std::int64_t num_rows, dim;
  std::vector<std::int64_t> sizes;
  int beam_size;
  bool tables;
};

// Of exactly this size, so that ASan sees one element too far.
template <typename T>
std::unique_ptr<T[]> array(std::size_t size) {
  return std::unique_ptr<T[]>(new T[size]);
}

template <typename C>
struct Problem {
  explicit Problem(const Case& c, unsigned seed) : shape(c), random(seed) {
    for (const std::int64_t size : c.sizes) {
      total += size;
    }
    x = array<C>(c.num_rows * c.dim), quantized = array<C>(c.num_rows * c.dim), codebooks = array<C>(total * c.dim);
    codes = array<std::int32_t>(c.num_rows * c.sizes.size());
  }

  // capacity < 0: what the plan says.
  bool run(int capacity = -1) {
    using namespace h2rec::cuda;
    const Dtype dtype = sizeof(C) == 8 ? Dtype::kFloat64 : Dtype::kFloat32;
    const ResidualQuantizeArgs args{make_rows(x.get(), dtype, shape.dim, 1, shape.dim), shape.num_rows, codebooks.get(),
                                    shape.sizes.data(), static_cast<int>(shape.sizes.size()), dtype, quantized.get(),
                                    codes.get()};
    ResidualQuantizePlan plan = plan_residual_quantize(args, shape.beam_size);
    plan.tables = shape.tables;
    plan.capacity = capacity < 0 ? plan.capacity : capacity;
    const auto bytes = static_cast<std::size_t>(workspace_bytes(args, plan));
    void* workspace = nullptr;
    if (posix_memalign(&workspace, 256, bytes) != 0) {
      std::abort();
    }
    std::memset(workspace, 0xff, bytes);
    const bool success = residual_quantize(args, plan, workspace, nullptr) == 0;
    Search search = make_search(args, plan);
    lay_out(args, search, static_cast<unsigned char*>(workspace));
    most_candidates = 0;
    for (std::int64_t n = 0; success && n < std::min<std::int64_t>(shape.num_rows, search.tile_rows); ++n) {
      most_candidates = std::max(most_candidates, search.counts[n]);
    }
    std::free(workspace);
    return success;
  }

  Case shape;
  std::mt19937 random;
  std::int64_t total = 0;
  std::unique_ptr<C[]> x, quantized, codebooks;
  std::unique_ptr<std::int32_t[]> codes;
  std::int32_t most_candidates = 0;  // of a row of the first tile at the last level
};

// Small integers: every distance is exact, and many are tied.
template <typename C>
bool agrees_with_fp64(const Case& c) {
  Problem<C> problem(c, static_cast<unsigned>(c.num_rows * 31 + c.dim));
  for (std::int64_t i = 0; i < c.num_rows * c.dim; ++i) {
    problem.x[i] = static_cast<C>(static_cast<int>(problem.random() % 9) - 4);
  }
  for (std::int64_t i = 0; i < problem.total * c.dim; ++i) {
    const std::int64_t d = i % c.dim;
    const bool same = c.dim > 64 && d / 8 != 8;  // long codewords differ in elements of the warp's other half: many candidates
    problem.codebooks[i] = static_cast<C>(static_cast<int>((same ? d : problem.random()) % 5) - 2);
  }
  const std::int64_t bad_row = c.num_rows / 2;  // nobody checked that it is finite
  problem.x[bad_row * c.dim] = static_cast<C>(NAN);
  if (!problem.run()) {
    return false;
  }
  struct Partial {
    std::vector<double> residual;
    std::vector<std::int32_t> codes;
  };
  for (std::int64_t n = 0; n < c.num_rows; ++n) {
    std::vector<Partial> paths{{{&problem.x[n * c.dim], &problem.x[n * c.dim] + c.dim}, {}}};
    const C* codebook = problem.codebooks.get();
    for (const std::int64_t size : c.sizes) {
      std::vector<std::tuple<double, int, std::int32_t>> extensions;
      for (std::size_t p = 0; p < paths.size(); ++p) {
        for (std::int64_t k = 0; k < size; ++k) {
          double distance = 0;
          for (std::int64_t d = 0; d < c.dim; ++d) {
            distance += std::pow(paths[p].residual[d] - codebook[k * c.dim + d], 2);
          }
          extensions.emplace_back(std::isnan(distance) ? INFINITY : distance, p, k);
        }
      }
      std::sort(extensions.begin(), extensions.end());
      extensions.resize(std::min<std::size_t>(extensions.size(), c.beam_size));
      std::vector<Partial> next;
      for (const auto& [distance, parent, code] : extensions) {
        next.push_back(paths[parent]);
        next.back().codes.push_back(code);
        for (std::int64_t d = 0; d < c.dim; ++d) {
          next.back().residual[d] -= codebook[code * c.dim + d];
        }
      }
      paths = std::move(next);
      codebook += size * c.dim;
    }
    if (!std::equal(paths[0].codes.begin(), paths[0].codes.end(), &problem.codes[n * c.sizes.size()])) {
      return false;
    }
    for (std::int64_t d = 0; d < c.dim; ++d) {
      const double sum = problem.quantized[n * c.dim + d];
      if (n == bad_row ? !std::isnan(sum) : sum != problem.x[n * c.dim + d] - paths[0].residual[d]) {
        return false;
      }
    }
  }
  return true;
}

// Codewords in close pairs: fp16 products cannot tell them apart. Candidates must not change what deciding on all codewords gives;
// and they are few, for with wrong products that would hide what is wrong.
bool candidates_change_nothing(const Case& c) {
  Problem<float> problem(c, 7);
  std::normal_distribution<float> normal;
  for (std::int64_t i = 0; i < c.num_rows * c.dim; ++i) {
    problem.x[i] = normal(problem.random);
  }
  for (std::int64_t k = 0; k < problem.total; ++k) {
    for (std::int64_t d = 0; d < c.dim; ++d) {
      float& element = problem.codebooks[k * c.dim + d];
      element = k % 2 == 0 ? normal(problem.random) : problem.codebooks[(k - 1) * c.dim + d];
      element *= k % 2 == 0 ? 1.0f : 1.0f + 1e-4f * normal(problem.random);
    }
  }
  if (!problem.run(0)) {
    return false;
  }
  const std::vector<std::int32_t> expected(problem.codes.get(), problem.codes.get() + c.num_rows * c.sizes.size());
  return problem.run() && std::equal(expected.begin(), expected.end(), problem.codes.get()) && problem.most_candidates < 8;
}

int main(int, char** arguments) {
  active_bug = std::atoi(arguments[1]);
  const bool all = agrees_with_fp64<float>({1, 8, {5, 3}, 1, false}) &&
                   agrees_with_fp64<float>({70, 3, {5, 130, 5}, 1, false}) &&
                   agrees_with_fp64<float>({67, 21, {5, 130}, 1, true}) &&
                   agrees_with_fp64<float>({11, 8, {5, 130, 5}, 3, true}) &&
                   agrees_with_fp64<float>({40, 6, {7, 9, 3}, 7, false}) &&
                   agrees_with_fp64<double>({33, 6, {140, 3}, 2, true}) &&
                   agrees_with_fp64<float>({3, 130, {40}, 1, false}) && candidates_change_nothing({1, 40, {60}, 1, false}) &&
                   candidates_change_nothing({20, 40, {60, 20}, 1, false}) &&
                   candidates_change_nothing({9, 40, {60, 20}, 2, true});
  std::puts(all ? "agrees" : "DIFFERS");
  return all ? 0 : 1;
}
