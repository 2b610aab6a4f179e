#include "sorted_rows.h"

#include <algorithm>
#include <bit>
#include <stdexcept>
#include <utility>

#include "item_rows.h"

namespace h2rec {
namespace {

using std::int64_t;
using std::uint64_t;
using Keys = std::unique_ptr<uint64_t[]>;

constexpr int64_t kKeysPerChunk = 4096;  // what is worth a thread
constexpr int64_t kMaxChunks = 32;

// Stable, by the bits [low, high): least significant digit first. Each chunk of keys counts its digits and then writes where
// the chunks before it, and the smaller digits of all, leave off.
Keys radix_sort(Keys keys, int64_t count, int low, int high, ParallelFor parallel_for) {
  const int widest = count < 8192 ? 8 : 11;  // a histogram should be small beside the keys
  const int passes = (high - low + widest - 1) / widest;
  if (passes == 0) {
    return keys;
  }
  const int digit_bits = (high - low + passes - 1) / passes;
  const int64_t num_digits = int64_t{1} << digit_bits;
  const int64_t num_chunks = std::clamp<int64_t>(count / kKeysPerChunk, 1, kMaxChunks);
  Keys sorted = std::make_unique_for_overwrite<uint64_t[]>(count);
  std::vector<int64_t> positions(num_chunks * num_digits);
  for (int shift = low; shift < high; shift += digit_bits) {
    const auto digit = [&](uint64_t key) { return (key >> shift) & (num_digits - 1); };
    const auto for_each_chunk = [&](auto function) {
      parallel_for(0, num_chunks, 1, [&](int64_t first, int64_t last) {
        for (int64_t chunk = first; chunk < last; ++chunk) {
          int64_t* positions_of_chunk = positions.data() + chunk * num_digits;
          for (int64_t i = chunk * count / num_chunks; i < (chunk + 1) * count / num_chunks; ++i) {
            function(keys[i], positions_of_chunk[digit(keys[i])]);
          }
        }
      });
    };
    std::fill(positions.begin(), positions.end(), 0);
    for_each_chunk([](uint64_t, int64_t& seen) { ++seen; });
    int64_t position = 0;
    for (int64_t d = 0; d < num_digits; ++d) {
      for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
        position += std::exchange(positions[chunk * num_digits + d], position);
      }
    }
    for_each_chunk([&](uint64_t key, int64_t& next) { sorted[next++] = key; });
    std::swap(keys, sorted);
  }
  return keys;
}

}  // namespace

SortedRows sort_rows(const int64_t* rows, int64_t num_tokens, int64_t rows_per_token, int64_t limit,
                     ParallelFor parallel_for) {
  const int token_bits = std::bit_width(static_cast<uint64_t>(num_tokens));
  const int row_bits = std::bit_width(static_cast<uint64_t>(limit));
  if (token_bits + row_bits > 64) {
    throw std::length_error("the tokens and the table are too many to be sorted by 64-bit keys");
  }
  const int64_t count = num_tokens * rows_per_token;
  Keys keys = std::make_unique_for_overwrite<uint64_t[]>(count);
  parallel_for(0, num_tokens, kKeysPerChunk, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      for (int64_t i = token * rows_per_token; i < (token + 1) * rows_per_token; ++i) {
        const uint64_t row = static_cast<uint64_t>(rows[i] == kNoRow ? limit : rows[i]);  // goes to the end
        keys[i] = row << token_bits | static_cast<uint64_t>(token);
      }
    }
  });
  keys = radix_sort(std::move(keys), count, token_bits, token_bits + row_bits, parallel_for);

  SortedRows sorted{std::move(keys), token_bits, std::vector<int64_t>(count), std::vector<int64_t>(count + 1)};
  int64_t num_rows = 0, i = 0;
  for (int64_t before = -1; i < count; ++i) {  // written whether new or not: which it is cannot be foreseen
    const int64_t row = static_cast<int64_t>(sorted.keys[i] >> token_bits);
    if (row == limit) {
      break;
    }
    sorted.rows[num_rows] = row;
    sorted.starts[num_rows] = i;
    num_rows += row != before;
    before = row;
  }
  sorted.starts[num_rows] = i;
  sorted.rows.resize(num_rows);
  sorted.starts.resize(num_rows + 1);
  return sorted;
}

}  // namespace h2rec
