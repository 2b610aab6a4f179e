// Gathers and sums of rows.

// Stored as T, summed as Sum<T>.
template <class T>
struct SumOf {
  using Type = float;
};
template <>
struct SumOf<double> {
  using Type = double;
};
template <class T>
using Sum = typename SumOf<T>::Type;

template <class T, int kLanes>
struct Lanes {
  typedef T Type __attribute__((vector_size(kLanes * sizeof(T))));
};
template <class T, int kLanes>
using Vector = typename Lanes<T, kLanes>::Type;

template <class V>
[[gnu::always_inline]] inline V load_bits(const void* source) {
  V values;
  __builtin_memcpy(&values, source, sizeof(V));
  return values;
}

template <class V>
[[gnu::always_inline]] inline void store_bits(void* target, V values) {
  __builtin_memcpy(target, &values, sizeof(V));
}

// 16-bit types are converted by integer arithmetic, which is alike on every instruction set.
template <class T, int kLanes>
struct Convert {
  using Values = Vector<T, kLanes>;
  static Values load(const T* source) { return load_bits<Values>(source); }
  static void store(T* target, Values values) { store_bits(target, values); }
};

template <int kLanes>
struct Convert<BFloat16, kLanes> {
  using Values = Vector<float, kLanes>;
  using Bits = Vector<std::uint32_t, kLanes>;
  using Bits16 = Vector<std::uint16_t, kLanes>;

  static Values load(const BFloat16* source) {
    return reinterpret_cast<Values>(__builtin_convertvector(load_bits<Bits16>(source), Bits) << 16);
  }
  static void store(BFloat16* target, Values values) {
    const Bits bits = reinterpret_cast<Bits>(values);
    const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
    const Bits nan = Bits{} + 0x7fc0;
    store_bits(target, __builtin_convertvector((bits & 0x7fffffff) > 0x7f800000 ? nan : rounded, Bits16));
  }
};

template <int kLanes>
struct Convert<Half, kLanes> {
  using Values = Vector<float, kLanes>;
  using Bits = Vector<std::uint32_t, kLanes>;
  using Bits16 = Vector<std::uint16_t, kLanes>;

  static Values load(const Half* source) {
    const Bits bits = __builtin_convertvector(load_bits<Bits16>(source), Bits);
    const Bits magnitude = bits & 0x7fff;
    // The exponent's bias differs by 112; a multiplication mends it for subnormal numbers too.
    const Bits finite = reinterpret_cast<Bits>(reinterpret_cast<Values>(magnitude << 13) * 0x1p112f);
    const Bits infinite_or_nan = magnitude << 13 | 0x7f800000;
    return reinterpret_cast<Values>((magnitude < 0x7c00 ? finite : infinite_or_nan) | (bits & 0x8000) << 16);
  }
  static void store(Half* target, Values values) {
    const Bits bits = reinterpret_cast<Bits>(values);
    const Bits magnitude = bits & 0x7fffffff;
    const Bits normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    // Below 2^-14 a half counts steps of 2^-24, and so does a float in [0.5, 1).
    const Bits subnormal = reinterpret_cast<Bits>(reinterpret_cast<Values>(magnitude) + 0.5f) - 0x3f000000;
    const Bits infinity = Bits{} + 0x7c00, nan = Bits{} + 0x7e00;
    const Bits large = magnitude > 0x7f800000 ? nan : infinity;
    const Bits small = magnitude < 0x38800000 ? subnormal : normal;
    store_bits(target,
               __builtin_convertvector((magnitude < 0x47800000 ? small : large) | (bits >> 16 & 0x8000), Bits16));
  }
};

// Calls f.operator()<kLanes, kVectors>(column) on pieces of kVectors vectors of kLanes columns that cover [begin, end); S is
// what fills a vector register.
template <class S, class Function>
[[gnu::always_inline]] inline void for_columns(std::int64_t begin, std::int64_t end, Function f) {
  constexpr int kWide = kVectorBytes / sizeof(S), kNarrow = 16 / sizeof(S);
  std::int64_t column = begin;
  for (; column + 4 * kWide <= end; column += 4 * kWide) {
    f.template operator()<kWide, 4>(column);
  }
  for (; column + kWide <= end; column += kWide) {
    f.template operator()<kWide, 1>(column);
  }
  for (; column + kNarrow <= end; column += kNarrow) {
    f.template operator()<kNarrow, 1>(column);
  }
  for (; column < end; ++column) {
    f.template operator()<1, 1>(column);
  }
}

// Some columns of a sum of rows of T, in S.
template <class T, class S, int kLanes, int kVectors>
struct Piece {
  Vector<S, kLanes> values[kVectors] = {};

  [[gnu::always_inline]] void add(const T* source) {
    for (int i = 0; i < kVectors; ++i) {
      values[i] += __builtin_convertvector(Convert<T, kLanes>::load(source + i * kLanes), Vector<S, kLanes>);
    }
  }
  [[gnu::always_inline]] void scale_and_add(S scale, const Piece& other, S other_scale) {
    for (int i = 0; i < kVectors; ++i) {
      values[i] = values[i] * scale + other.values[i] * other_scale;
    }
  }
  [[gnu::always_inline]] void store(T* target) const {
    for (int i = 0; i < kVectors; ++i) {
      Convert<T, kLanes>::store(target + i * kLanes, __builtin_convertvector(values[i], Vector<Sum<T>, kLanes>));
    }
  }
};

template <class T>
[[gnu::always_inline]] inline void prefetch_row(const T* row, std::int64_t width) {
  const char* bytes = reinterpret_cast<const char*>(row);
  for (std::int64_t i = 0; i < width * static_cast<std::int64_t>(sizeof(T)); i += 64) {
    __builtin_prefetch(bytes + i);
  }
}

template <class T>
void pool_as(const Pool& pool, const std::int32_t* codebook_rows, const std::int64_t* table_rows, std::int64_t begin,
             std::int64_t end) {
  const T* codebooks = static_cast<const T*>(pool.codebooks.data);
  const T* table = static_cast<const T*>(pool.table.data);
  // All at once: a prefetch waits for its page to be found, which few do side by side among the instructions of the sums.
  for (std::int64_t i = 0; i < (end - begin) * pool.num_hashes; ++i) {
    prefetch_row(table + table_rows[i] * pool.table.stride, pool.table_dim);
  }
  for (const Part* part = pool.parts; part < pool.parts + pool.num_parts; ++part) {
    for (std::int64_t token = begin; token < end; ++token) {
      const std::int32_t* codewords = codebook_rows + (token - begin) * pool.num_levels;
      const std::int64_t* hashes = table_rows + (token - begin) * pool.num_hashes;
      T* out = static_cast<T*>(part->out) + token * part->out_stride;
      if (pool.num_levels > 0 ? codewords[0] < 0 : hashes[0] < 0) {
        __builtin_memset(out, 0, part->width * sizeof(T));
        continue;
      }
      for_columns<Sum<T>>(0, part->width, [&]<int kLanes, int kVectors>(std::int64_t column) __attribute__((always_inline)) {
        Piece<T, Sum<T>, kLanes, kVectors> semantic, hashed;
        for (std::int64_t level = part->first_level; level < part->last_level; ++level) {
          semantic.add(codebooks + codewords[level] * pool.codebooks.stride + column);
        }
        for (std::int64_t j = 0; j < part->num_hashes; ++j) {
          hashed.add(table + hashes[j] * pool.table.stride + part->table_column + column);
        }
        semantic.scale_and_add(static_cast<Sum<T>>(part->codebook_scale), hashed,
                               static_cast<Sum<T>>(part->table_scale));
        semantic.store(out + column);
      });
    }
  }
}

template <class T>
void add_to_codewords_as(const CodewordSums& sums, std::int64_t first_level, std::int64_t last_level,
                         std::int64_t first_column, std::int64_t last_column) {
  const T* grad = static_cast<const T*>(sums.grad.data);
  for (std::int64_t token = 0; token < sums.num_tokens; ++token, grad += sums.grad.stride) {
    const std::int32_t* rows = sums.rows + token * sums.num_levels;
    if (rows[0] < 0) {
      continue;
    }
    for (std::int64_t level = first_level; level < last_level; ++level) {
      const T* source = grad + level * sums.level_stride;
      Sum<T>* target = static_cast<Sum<T>*>(sums.sums) + rows[level] * sums.dim;
      for_columns<Sum<T>>(first_column, last_column,
                     [&]<int kLanes, int kVectors>(std::int64_t column) __attribute__((always_inline)) {
                       for (int i = 0; i < kVectors; ++i, column += kLanes) {
                         Sum<T>* sum = target + column;
                         store_bits(sum, load_bits<Vector<Sum<T>, kLanes>>(sum) +
                                             Convert<T, kLanes>::load(source + column));
                       }
                     });
    }
  }
}

template <class T>
void round_as(const void* sums, double divisor, std::int64_t count, void* out) {
  const Sum<T>* source = static_cast<const Sum<T>*>(sums);
  T* target = static_cast<T*>(out);
  for_columns<Sum<T>>(0, count, [&]<int kLanes, int kVectors>(std::int64_t i) __attribute__((always_inline)) {
    for (int j = 0; j < kVectors; ++j, i += kLanes) {
      const auto values = load_bits<Vector<Sum<T>, kLanes>>(source + i);
      Convert<T, kLanes>::store(target + i, values / static_cast<Sum<T>>(divisor));
    }
  });
}

constexpr std::int64_t kRowsAhead = 8;  // that are summed while a row comes from memory

// In fp64: a row is read by a few tokens or by thousands, and the arithmetic waits for memory anyway.
template <class T>
void sum_run_as(const RunSums& sums, std::int64_t begin, std::int64_t end, void* out) {
  const T* grad = static_cast<const T*>(sums.grad.data);
  const auto row_of = [&](std::int64_t i) {
    return grad + static_cast<std::int64_t>(sums.keys[i] & sums.token_mask) * sums.grad.stride;
  };
  for (std::int64_t i = begin + kRowsAhead; i < end + kRowsAhead && i < sums.num_keys; ++i) {
    prefetch_row(row_of(i), sums.dim);
  }
  for_columns<double>(0, sums.dim, [&]<int kLanes, int kVectors>(std::int64_t column) __attribute__((always_inline)) {
    Piece<T, double, kLanes, kVectors> sum;
    for (std::int64_t i = begin; i < end; ++i) {
      sum.add(row_of(i) + column);
    }
    sum.scale_and_add(1 / sums.divisor, {}, 0);
    sum.store(static_cast<T*>(out) + column);
  });
}

// An instantiation for each FloatType, in its order.
constexpr PoolFunction* pool[] = {pool_as<float>, pool_as<double>, pool_as<BFloat16>, pool_as<Half>};
constexpr AddToCodewords* add_to_codewords[] = {add_to_codewords_as<float>, add_to_codewords_as<double>,
                                                add_to_codewords_as<BFloat16>, add_to_codewords_as<Half>};
constexpr RoundFunction* round[] = {round_as<float>, round_as<double>, round_as<BFloat16>, round_as<Half>};
constexpr SumRun* sum_run[] = {sum_run_as<float>, sum_run_as<double>, sum_run_as<BFloat16>, sum_run_as<Half>};
