// Items that want places on tuples of codes, of which each takes only so many.
#pragma once

#include <cstdint>
#include <vector>

namespace h2rec::catalog {

// The items of one prefix of codes share num_codes last codes, each with room for `capacity` of them.
struct Wishes {
  const std::int64_t* prefixes;    // [num_items], ascending; within a prefix those that choose first stand first
  const std::int32_t* candidates;  // [num_items, num_candidates], row-major: last codes, the best first
  std::int64_t num_items, num_candidates;
};

struct Settled {
  const std::int64_t* prefixes;  // [num_items], ascending
  const std::int32_t* codes;     // [num_items]
  std::int64_t num_items;
};

// Which of its candidates each item gets, -1 if none has room. Settled items have their places before all others; then who
// finds room on the first candidate takes it; then the others choose in their order. Memory O(num_codes); time O(candidates).
// Throws std::invalid_argument if a code lies outside [0, num_codes).
std::vector<std::int32_t> place_items(const Wishes& wishes, const Settled& settled, std::int64_t num_codes,
                                      std::int64_t capacity);

}  // namespace h2rec::catalog
