// From item ids to rows: of the packed codebooks by the item's codes, of the hash table by its hash.
#pragma once

#include <cstdint>
#include <optional>

namespace h2rec {

enum class IntegerType { kUInt8, kInt8, kInt16, kInt32, kInt64 };

enum class HashMode { kNone, kDirect, kMulti, kQuotientRemainder, kPrefix };

// What find_rows must know. Fields of a half that is not asked for are unused.
struct ItemRows {
  const void* item_ids;  // [T]
  IntegerType id_type;
  std::int64_t num_items;
  std::optional<std::int64_t> padding_idx;

  const void* codes;  // [num_items, num_levels]; null if neither codebooks nor hash read it
  IntegerType code_type;
  std::int64_t code_strides[2];
  std::int64_t num_levels;
  const std::int64_t* sizes;  // [num_levels], rows of each codebook; null without codebooks

  HashMode hash_mode;
  const std::int64_t* constants;  // [num_hashes, 2]
  std::int64_t num_hashes;        // rows that an item reads from the table
  std::int64_t divisor;
  std::int64_t num_rows;  // of the table
};

enum class Fault { kNone, kItemId, kCode };

constexpr std::int64_t kNoRow = -1;

// Rows of the tokens [begin, end): codebook_rows [end - begin, num_levels] if there are sizes, and table_rows
// [end - begin, num_hashes] if there is a hash mode. Padding, and what is out of range, reads no row: all of its rows are
// kNoRow. Returns what was out of range, if anything.
Fault find_rows(const ItemRows& items, std::int64_t begin, std::int64_t end, std::int32_t* codebook_rows,
                std::int64_t* table_rows);

}  // namespace h2rec
