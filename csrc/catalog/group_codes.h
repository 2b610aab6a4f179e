// Items that share a semantic ID, for catalogs of any size.
#pragma once

#include <cstdint>
#include <vector>

namespace h2rec::catalog {

// codes [num_items, num_levels], row-major, none negative. Writes to order [num_items] the item ids sorted by their row of
// codes (first level first; equal rows by item id), and returns where each run of equal rows starts in it, with num_items
// as the last entry. O(num_items * num_levels). Throws std::invalid_argument on a negative code.
std::vector<std::int64_t> group_codes(const std::int32_t* codes, std::int64_t num_items, std::int64_t num_levels,
                                      std::int64_t* order);

}  // namespace h2rec::catalog
