#include "item_rows.h"

#include <algorithm>
#include <memory>

namespace h2rec {
namespace {

using std::int64_t;
using std::uint64_t;

constexpr int64_t kBlock = 128;         // tokens whose ids and codes are read before their rows are worked out
constexpr int64_t kPrefetchAhead = 16;  // codes of tokens to come: each is a cache miss in a large catalog

// 2^64 / golden ratio, odd: folds a tuple of codes into one integer. As in h2rec/reference/harmonized_embedding.py.
constexpr uint64_t kFold = 0x9E3779B97F4A7C15;

template <class Function>
void with_integer_type(IntegerType type, Function function) {
  switch (type) {
    case IntegerType::kUInt8:
      return function(std::uint8_t{});
    case IntegerType::kInt8:
      return function(std::int8_t{});
    case IntegerType::kInt16:
      return function(std::int16_t{});
    case IntegerType::kInt32:
      return function(std::int32_t{});
    case IntegerType::kInt64:
      return function(int64_t{});
  }
}

// kNoRow for padding and for ids out of range.
Fault read_ids(const ItemRows& items, int64_t begin, int64_t count, int64_t* ids) {
  Fault fault = Fault::kNone;
  with_integer_type(items.id_type, [&](auto example) {
    const auto* source = static_cast<const decltype(example)*>(items.item_ids) + begin;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t id = source[i];
      const bool padding = items.padding_idx == id;
      const bool in_range = static_cast<uint64_t>(id) < static_cast<uint64_t>(items.num_items);
      if (!padding && !in_range) {
        fault = Fault::kItemId;
      }
      ids[i] = padding || !in_range ? kNoRow : id;
    }
  });
  return fault;
}

void read_codes(const ItemRows& items, const int64_t* ids, int64_t count, int64_t* codes) {
  with_integer_type(items.code_type, [&](auto example) {
    const auto* table = static_cast<const decltype(example)*>(items.codes);
    const auto first_code = [&](int64_t i) { return table + std::max<int64_t>(ids[i], 0) * items.code_strides[0]; };
    for (int64_t i = 0; i < std::min(count, kPrefetchAhead); ++i) {
      __builtin_prefetch(first_code(i));
    }
    for (int64_t i = 0; i < count; ++i) {
      if (i + kPrefetchAhead < count) {
        __builtin_prefetch(first_code(i + kPrefetchAhead));
      }
      const auto* source = first_code(i);
      for (int64_t level = 0; level < items.num_levels; ++level) {
        *codes++ = ids[i] == kNoRow ? 0 : source[level * items.code_strides[1]];  // a catalog may be empty
      }
    }
  });
}

Fault find_codebook_rows(const ItemRows& items, int64_t* ids, const int64_t* codes, int64_t count, std::int32_t* rows) {
  Fault fault = Fault::kNone;
  for (int64_t i = 0; i < count; ++i, codes += items.num_levels, rows += items.num_levels) {
    bool in_range = true;
    int64_t first_row = 0;  // of the level's codebook
    for (int64_t level = 0; level < items.num_levels; ++level) {
      in_range &= static_cast<uint64_t>(codes[level]) < static_cast<uint64_t>(items.sizes[level]);
      rows[level] = static_cast<std::int32_t>(first_row + codes[level]);
      first_row += items.sizes[level];
    }
    if (ids[i] != kNoRow && !in_range) {
      fault = Fault::kCode;
      ids[i] = kNoRow;
    }
    if (ids[i] == kNoRow) {
      std::fill_n(rows, items.num_levels, static_cast<std::int32_t>(kNoRow));
    }
  }
  return fault;
}

int64_t hash(uint64_t key, const int64_t* constants, int64_t num_rows) {
  const uint64_t mixed = static_cast<uint64_t>(constants[0]) * key + static_cast<uint64_t>(constants[1]);
  return static_cast<int64_t>(((mixed >> 32) * static_cast<uint64_t>(num_rows)) >> 32);
}

void find_table_rows(const ItemRows& items, int64_t id, const int64_t* codes, int64_t* rows) {
  uint64_t key = 0;
  switch (items.hash_mode) {
    case HashMode::kNone:
      return;
    case HashMode::kDirect:
      rows[0] = id;
      return;
    case HashMode::kQuotientRemainder:
      rows[0] = id % items.divisor;
      rows[1] = items.divisor + id / items.divisor;
      return;
    case HashMode::kMulti:
      for (int64_t j = 0; j < items.num_hashes; ++j) {
        rows[j] = hash(static_cast<uint64_t>(id), items.constants + 2 * j, items.num_rows);
      }
      return;
    case HashMode::kPrefix:
      for (int64_t j = 0; j < items.num_hashes; ++j) {
        key = key * kFold + static_cast<uint64_t>(codes[j]) + 1;
        rows[j] = hash(key, items.constants + 2 * j, items.num_rows);
      }
      return;
  }
}

}  // namespace

Fault find_rows(const ItemRows& items, int64_t begin, int64_t end, std::int32_t* codebook_rows, int64_t* table_rows) {
  Fault fault = Fault::kNone;
  int64_t ids[kBlock];
  const auto codes = std::make_unique_for_overwrite<int64_t[]>(kBlock * items.num_levels);
  for (int64_t start = begin; start < end; start += kBlock) {
    const int64_t count = std::min(kBlock, end - start);
    fault = std::max(fault, read_ids(items, start, count, ids));
    if (items.codes != nullptr) {
      read_codes(items, ids, count, codes.get());
    }
    if (items.sizes != nullptr) {
      fault = std::max(fault, find_codebook_rows(items, ids, codes.get(), count, codebook_rows));
      codebook_rows += count * items.num_levels;
    }
    for (int64_t i = 0; i < count; ++i, table_rows += items.num_hashes) {
      if (ids[i] == kNoRow) {
        std::fill_n(table_rows, items.num_hashes, kNoRow);
      } else {
        find_table_rows(items, ids[i], codes.get() + i * items.num_levels, table_rows);
      }
    }
  }
  return fault;
}

}  // namespace h2rec
