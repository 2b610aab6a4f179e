#include "group_codes.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>

namespace h2rec::catalog {
namespace {

constexpr int kDigitBits = 16;
constexpr std::uint32_t kDigitMask = (1u << kDigitBits) - 1;

// The largest code of each level.
std::vector<std::int32_t> level_maxima(const std::int32_t* codes, std::int64_t num_items, std::int64_t num_levels) {
  std::vector<std::int32_t> maxima(num_levels, 0);
  for (std::int64_t item = 0; item < num_items; ++item) {
    for (std::int64_t level = 0; level < num_levels; ++level) {
      const std::int32_t code = codes[item * num_levels + level];
      if (code < 0) {
        throw std::invalid_argument("codes must not be negative, got " + std::to_string(code) + " at [" +
                                    std::to_string(item) + ", " + std::to_string(level) + "]");
      }
      maxima[level] = std::max(maxima[level], code);
    }
  }
  return maxima;
}

}  // namespace

// Radix sort from the least significant digit: a stable counting sort per level, last level first; a level with codes of
// more than 16 bits takes two.
std::vector<std::int64_t> group_codes(const std::int32_t* codes, std::int64_t num_items, std::int64_t num_levels,
                                      std::int64_t* order) {
  const std::vector<std::int32_t> maxima = level_maxima(codes, num_items, num_levels);
  std::vector<std::int64_t> sorted(num_items), scratch(num_items), next;
  std::iota(sorted.begin(), sorted.end(), std::int64_t{0});

  for (std::int64_t level = num_levels - 1; level >= 0; --level) {
    const auto largest = static_cast<std::uint32_t>(maxima[level]);
    for (int shift = 0; shift < 32 && (largest >> shift) > 0; shift += kDigitBits) {
      const auto digit = [&](std::int64_t item) {
        return (static_cast<std::uint32_t>(codes[item * num_levels + level]) >> shift) & kDigitMask;
      };
      // next[d]: where the next item with digit d goes.
      next.assign(std::min(largest >> shift, kDigitMask) + 1, 0);
      for (std::int64_t item = 0; item < num_items; ++item) {
        ++next[digit(item)];
      }
      std::exclusive_scan(next.begin(), next.end(), next.begin(), std::int64_t{0});
      for (const std::int64_t item : sorted) {
        scratch[next[digit(item)]++] = item;
      }
      sorted.swap(scratch);
    }
  }

  std::copy(sorted.begin(), sorted.end(), order);
  std::vector<std::int64_t> starts;
  for (std::int64_t i = 0; i < num_items; ++i) {
    const std::int32_t* row = codes + sorted[i] * num_levels;
    if (i == 0 || !std::equal(row, row + num_levels, codes + sorted[i - 1] * num_levels)) {
      starts.push_back(i);
    }
  }
  starts.push_back(num_items);
  return starts;
}

}  // namespace h2rec::catalog
