#include "co_occurrence.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <string>

namespace h2rec::catalog {
namespace {

void check(const Sequences& sequences) {
  const std::int64_t* offsets = sequences.offsets;
  const std::int64_t num_events = offsets[sequences.num_sequences];
  if (offsets[0] != 0 || !std::is_sorted(offsets, offsets + sequences.num_sequences + 1)) {
    throw std::invalid_argument("offsets must ascend from 0");
  }
  const auto outside = [&](std::int64_t item) { return item < 0 || item >= sequences.num_items; };
  if (const auto* bad = std::find_if(sequences.items, sequences.items + num_events, outside);
      bad != sequences.items + num_events) {
    throw std::invalid_argument("items must lie in [0, " + std::to_string(sequences.num_items) + "), got " +
                                std::to_string(*bad));
  }
}

// Calls visit(item, other, distance) for every pair, in both directions.
template <typename Visit>
void for_each_pair(const Sequences& sequences, std::int64_t window, Visit visit) {
  for (std::int64_t s = 0; s < sequences.num_sequences; ++s) {
    const std::int64_t begin = sequences.offsets[s], end = sequences.offsets[s + 1];
    for (std::int64_t i = begin; i < end; ++i) {
      for (std::int64_t j = i + 1; j < std::min(end, i + window + 1); ++j) {
        const std::int64_t a = sequences.items[i], b = sequences.items[j];
        if (a != b) {
          visit(a, b, j - i);
          visit(b, a, j - i);
        }
      }
    }
  }
}

struct Neighbour {
  std::int64_t item;
  double strength;
};

}  // namespace

// A counting sort brings together what each item was seen beside; a sort of each such part brings equal pairs together.
Neighbours co_occurrence(const Sequences& sequences, const CoOccurrenceOptions& options) {
  const std::int64_t num_items = sequences.num_items, window = options.window;
  if (num_items > (std::int64_t{1} << 32) / window) {
    throw std::length_error("num_items times window must not exceed 2^32");
  }
  check(sequences);
  std::vector<std::int64_t> starts(num_items + 1);  // of each item's part
  for_each_pair(sequences, window, [&](std::int64_t item, std::int64_t, std::int64_t) { ++starts[item + 1]; });
  std::partial_sum(starts.begin(), starts.end(), starts.begin());
  const auto seen_with = [&](std::int64_t item) { return double(starts[item + 1] - starts[item]); };
  const double total = double(starts[num_items]);

  std::vector<std::uint32_t> seen(starts[num_items]);  // other * window + distance - 1
  std::vector<std::int64_t> next(starts.begin(), starts.end() - 1);
  for_each_pair(sequences, window, [&](std::int64_t item, std::int64_t other, std::int64_t distance) {
    seen[next[item]++] = std::uint32_t(other * window + distance - 1);
  });

  Neighbours found{.offsets = {0}};
  std::vector<Neighbour> row;
  for (std::int64_t item = 0; item < num_items; ++item) {
    const auto begin = seen.begin() + starts[item], end = seen.begin() + starts[item + 1];
    std::sort(begin, end);
    row.clear();
    for (auto first = begin; first != end;) {
      const std::int64_t other = *first / window;
      auto last = first;
      double decayed = 0;
      while (last != end && *last / window == other) {  // by distance: equal numbers at each give equal sums
        const auto same = std::find_if(last, end, [&](std::uint32_t key) { return key != *last; });
        decayed += double(same - last) / double(*last % window + 1);
        last = same;
      }
      const double count = double(last - first);
      double strength = std::nearbyint(decayed * 1e9) / 1e9;  // six thirds and four halves are the same
      if (options.is_ppmi) {
        strength = std::log(count * total / (seen_with(item) * seen_with(other)));
      }
      if (count >= double(options.min_count) && strength > 0) {
        row.push_back({other, strength / std::pow(seen_with(other), options.discount)});
      }
      first = last;
    }
    const auto kept = row.begin() + std::min<std::int64_t>(options.max_per_item, row.size());
    std::partial_sort(row.begin(), kept, row.end(), [](const Neighbour& a, const Neighbour& b) {
      return a.strength != b.strength ? a.strength > b.strength : a.item < b.item;
    });
    for (auto neighbour = row.begin(); neighbour != kept; ++neighbour) {
      found.neighbours.push_back(neighbour->item);
      found.strengths.push_back(neighbour->strength);
    }
    found.offsets.push_back(std::int64_t(found.neighbours.size()));
  }
  return found;
}

}  // namespace h2rec::catalog
