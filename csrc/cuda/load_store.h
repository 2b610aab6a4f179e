// Elements of rows of any dtype, widened to C, float or double; and back.
#pragma once

#include <cstdint>

#include "device.h"
#include "rows.h"

namespace h2rec::cuda {

template <typename C>
struct alignas(16) Four {
  C at[4];
};

// A subnormal or normal half, moved to the place of a float's fields, is short of 2^112.
__device__ inline float from_bits(std::uint16_t bits, Dtype dtype) {
  const unsigned sign = static_cast<unsigned>(bits & 0x8000u) << 16;
  if (dtype == Dtype::kBFloat16) {
    return __uint_as_float(static_cast<unsigned>(bits) << 16);
  }
  const unsigned magnitude = static_cast<unsigned>(bits & 0x7fffu) << 13;
  if (magnitude >= 0x0f800000u) {  // infinity or NaN
    return __uint_as_float(sign | 0x7f800000u | (magnitude & 0x007fe000u));
  }
  return __uint_as_float(sign | __float_as_uint(__uint_as_float(magnitude) * 0x1p112f));
}

// To nearest, ties to even.
__device__ inline std::uint16_t to_bits(float value, Dtype dtype) {
  const unsigned all = __float_as_uint(value), magnitude = all & 0x7fffffffu;
  const auto sign = static_cast<unsigned>(all >> 16 & 0x8000u);
  if (dtype == Dtype::kBFloat16) {
    return magnitude > 0x7f800000u ? 0x7fffu : static_cast<std::uint16_t>((all + 0x7fffu + (all >> 16 & 1u)) >> 16);
  }
  if (magnitude > 0x7f800000u) {
    return 0x7fffu;
  }
  if (magnitude >= 0x477ff000u) {  // rounds to 65536 or more
    return static_cast<std::uint16_t>(sign | 0x7c00u);
  }
  if (magnitude < 0x38800000u) {  // subnormal: the addition of 0.5 rounds at 2^-24, the smallest half
    return static_cast<std::uint16_t>(sign | (__float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u));
  }
  return static_cast<std::uint16_t>(sign | ((magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13));
}

// 16-byte loads: the compiler does not join scalar ones, for it does not know that they are aligned.
template <typename C>
__device__ inline Four<C> load_wide(const Rows& rows, std::int64_t place) {
  if (rows.dtype == Dtype::kFloat32) {
    const float4 v = *reinterpret_cast<const float4*>(static_cast<const float*>(rows.data) + place);
    return {{C(v.x), C(v.y), C(v.z), C(v.w)}};
  }
  if (rows.dtype == Dtype::kFloat64) {
    const auto* p = reinterpret_cast<const double2*>(static_cast<const double*>(rows.data) + place);
    const double2 low = p[0], high = p[1];
    return {{C(low.x), C(low.y), C(high.x), C(high.y)}};
  }
  const uint2 pairs = *reinterpret_cast<const uint2*>(static_cast<const std::uint16_t*>(rows.data) + place);
  const auto half = [&](unsigned bits) { return C(from_bits(static_cast<std::uint16_t>(bits), rows.dtype)); };
  return {{half(pairs.x), half(pairs.x >> 16), half(pairs.y), half(pairs.y >> 16)}};
}

template <typename C>
__device__ inline C load_one(const Rows& rows, std::int64_t place) {
  if (rows.dtype == Dtype::kFloat32) {
    return C(static_cast<const float*>(rows.data)[place]);
  }
  if (rows.dtype == Dtype::kFloat64) {
    return C(static_cast<const double*>(rows.data)[place]);
  }
  return C(from_bits(static_cast<const std::uint16_t*>(rows.data)[place], rows.dtype));
}

// Elements [d, d + 4) of a row; zeros beyond its end, which add nothing to a norm or a distance.
template <typename C>
__device__ inline Four<C> load4(const Rows& rows, std::int64_t row, std::int64_t d) {
  const std::int64_t place = row * rows.row_stride + d * rows.column_stride;
  if (rows.wide && d + 4 <= rows.dim) {
    return load_wide<C>(rows, place);
  }
  Four<C> v;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v.at[i] = d + i < rows.dim ? load_one<C>(rows, place + i * rows.column_stride) : C(0);
  }
  return v;
}

__device__ inline void store_one(void* data, Dtype dtype, std::int64_t place, double value) {
  if (dtype == Dtype::kFloat64) {
    static_cast<double*>(data)[place] = value;
  } else if (dtype == Dtype::kFloat32) {
    static_cast<float*>(data)[place] = static_cast<float>(value);
  } else {
    static_cast<std::uint16_t*>(data)[place] = to_bits(static_cast<float>(value), dtype);
  }
}

}  // namespace h2rec::cuda
