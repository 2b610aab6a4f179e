// Which items stand near each other in sequences, for catalogs and logs of any size.
#pragma once

#include <cstdint>
#include <vector>

namespace h2rec::catalog {

struct Sequences {
  const std::int64_t* items;    // those of all sequences, one sequence after the other, in [0, num_items)
  const std::int64_t* offsets;  // [num_sequences + 1]
  std::int64_t num_sequences, num_items;
};

struct CoOccurrenceOptions {
  std::int64_t window, min_count, max_per_item;
  bool is_ppmi;     // else the sum of 1 / distance
  double discount;  // a neighbour's strength is divided by its number of pairs to this power
};

// Row i: neighbours[offsets[i] .. offsets[i + 1]), strongest first, of equals the lower id.
struct Neighbours {
  std::vector<std::int64_t> offsets, neighbours;
  std::vector<double> strengths;
};

// Counts pairs at distance 1 to window within a sequence, in both directions, no item with itself. Keeps those that were seen
// min_count times and have a positive strength, and of each item the max_per_item strongest. Four bytes for each pair seen, in
// each direction, and O(num_items). Throws std::length_error if num_items * window exceeds 2^32, and std::invalid_argument if
// offsets or items are out of range.
Neighbours co_occurrence(const Sequences& sequences, const CoOccurrenceOptions& options);

}  // namespace h2rec::catalog
