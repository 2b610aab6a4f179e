#include "item_rows.h"

#include <algorithm>
#include <memory>

namespace h2rec {
namespace {

using std::int64_t;
using std::uint64_t;

constexpr int64_t kBlock = 128;  // tokens whose ids and codes are read before their rows are worked out

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
  const uint64_t num_items = static_cast<uint64_t>(items.num_items);
  const bool has_padding = items.padding_idx.has_value();
  const int64_t padding_idx = items.padding_idx.value_or(0);
  with_integer_type(items.id_type, [&](auto example) {
    const auto* source = static_cast<const decltype(example)*>(items.item_ids) + begin;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t id = source[i];
      const bool padding = id == padding_idx && has_padding;
      const bool in_range = static_cast<uint64_t>(id) < num_items;
      if (!padding && !in_range) {
        fault = Fault::kItemId;
      }
      ids[i] = padding || !in_range ? kNoRow : id;
    }
  });
  return fault;
}

// Calls `use(i, codes)` for each token that is not kNoRow, with its first code in memory.
template <class Code, class Function>
void for_each_code(const ItemRows& items, const int64_t* ids, int64_t count, Function use) {
  const Code* const table = static_cast<const Code*>(items.codes);
  const int64_t stride = items.code_strides[0];
  for (int64_t i = 0; i < count; ++i) {
    if (ids[i] != kNoRow) {  // a cache miss in a large catalog, and a page to find: many at once
      __builtin_prefetch(table + ids[i] * stride);
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    if (ids[i] != kNoRow) {
      use(i, table + ids[i] * stride);
    }
  }
}

void read_codes(const ItemRows& items, const int64_t* ids, int64_t count, int64_t* codes) {
  const int64_t num_levels = items.num_levels, stride = items.code_strides[1];
  with_integer_type(items.code_type, [&](auto example) {
    using Code = decltype(example);
    for_each_code<Code>(items, ids, count, [=](int64_t i, const Code* source) {
      for (int64_t level = 0; level < num_levels; ++level) {
        codes[i * num_levels + level] = source[level * stride];
      }
    });
  });
}

// Tokens with a code out of range become kNoRow.
Fault find_codebook_rows(const ItemRows& items, int64_t* ids, int64_t count, std::int32_t* rows) {
  const int64_t num_levels = items.num_levels, stride = items.code_strides[1];
  const int64_t* const sizes = items.sizes;
  Fault fault = Fault::kNone;
  with_integer_type(items.code_type, [&](auto example) {
    using Code = decltype(example);
    for_each_code<Code>(items, ids, count, [&, rows](int64_t i, const Code* source) {
      std::int32_t* const target = rows + i * num_levels;
      uint64_t first_row = 0;  // of the level's codebook
      bool in_range = true;
      for (int64_t level = 0; level < num_levels; ++level) {
        const uint64_t code = static_cast<uint64_t>(static_cast<int64_t>(source[level * stride]));
        const uint64_t size = static_cast<uint64_t>(sizes[level]);
        in_range &= code < size;
        target[level] = static_cast<std::int32_t>(first_row + code);
        first_row += size;
      }
      if (!in_range) {
        fault = Fault::kCode;
        ids[i] = kNoRow;
      }
    });
  });
  for (int64_t i = 0; i < count; ++i) {
    if (ids[i] == kNoRow) {
      std::fill_n(rows + i * num_levels, num_levels, static_cast<std::int32_t>(kNoRow));
    }
  }
  return fault;
}

int64_t hash(uint64_t key, const int64_t* constants, int64_t num_rows) {
  const uint64_t mixed = static_cast<uint64_t>(constants[0]) * key + static_cast<uint64_t>(constants[1]);
  return static_cast<int64_t>(((mixed >> 32) * static_cast<uint64_t>(num_rows)) >> 32);
}

// `codes [count, num_levels]` are read by kPrefix only.
void find_table_rows(const ItemRows& items, const int64_t* ids, const int64_t* codes, int64_t count, int64_t* rows) {
  const int64_t num_hashes = items.num_hashes;
  const auto for_each = [&](auto find) {
    for (int64_t i = 0; i < count; ++i, rows += num_hashes) {
      ids[i] == kNoRow ? static_cast<void>(std::fill_n(rows, num_hashes, kNoRow)) : find(i, rows);
    }
  };
  switch (items.hash_mode) {
    case HashMode::kNone:
      return;
    case HashMode::kDirect:
      std::copy_n(ids, count, rows);
      return;
    case HashMode::kQuotientRemainder:
      return for_each([&](int64_t i, int64_t* found) {
        found[0] = ids[i] % items.divisor;
        found[1] = items.divisor + ids[i] / items.divisor;
      });
    case HashMode::kMulti:
      return for_each([&](int64_t i, int64_t* found) {
        for (int64_t j = 0; j < num_hashes; ++j) {
          found[j] = hash(static_cast<uint64_t>(ids[i]), items.constants + 2 * j, items.num_rows);
        }
      });
    case HashMode::kPrefix:
      return for_each([&](int64_t i, int64_t* found) {
        uint64_t key = 0;
        for (int64_t j = 0; j < num_hashes; ++j) {
          key = key * kFold + static_cast<uint64_t>(codes[i * items.num_levels + j]) + 1;
          found[j] = hash(key, items.constants + 2 * j, items.num_rows);
        }
      });
  }
}

}  // namespace

Fault find_rows(const ItemRows& items, int64_t begin, int64_t end, std::int32_t* codebook_rows, int64_t* table_rows) {
  Fault fault = Fault::kNone;
  int64_t ids[kBlock];
  std::unique_ptr<int64_t[]> codes;
  if (items.hash_mode == HashMode::kPrefix) {
    codes = std::make_unique_for_overwrite<int64_t[]>(kBlock * items.num_levels);
  }
  for (int64_t start = begin; start < end; start += kBlock) {
    const int64_t count = std::min(kBlock, end - start);
    fault = std::max(fault, read_ids(items, start, count, ids));
    if (items.sizes != nullptr) {
      fault = std::max(fault, find_codebook_rows(items, ids, count, codebook_rows));
      codebook_rows += count * items.num_levels;
    }
    if (codes != nullptr) {
      read_codes(items, ids, count, codes.get());
    }
    find_table_rows(items, ids, codes.get(), count, table_rows);
    table_rows += count * items.num_hashes;
  }
  return fault;
}

}  // namespace h2rec
