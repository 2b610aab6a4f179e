// What the 32 lanes of a warp do together. All of them must call.
#pragma once

#include "device.h"

namespace h2rec::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// The same bits in every lane.
template <typename C>
__device__ inline C warp_sum(C value) {
#pragma unroll
  for (int step = kWarpSize / 2; step > 0; step /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, step);
  }
  return value;
}

__device__ inline float warp_min(float value) {
#pragma unroll
  for (int step = kWarpSize / 2; step > 0; step /= 2) {
    const float other = __shfl_xor_sync(kAllLanes, value, step);
    value = other < value ? other : value;
  }
  return value;
}

// The 32 smallest of what was offered, in ascending order, one a lane; ties are in the order of the indices.
template <typename C>
struct SortedLanes {
  C key = C(INFINITY);
  int index = 0;

  // The same in every lane.
  __device__ void offer(C new_key, int new_index, int lane) {
    const bool later = new_key < key || (new_key == key && new_index < index);  // my entry is to come after the new one
    const C key_before = __shfl_up_sync(kAllLanes, key, 1);
    const int index_before = __shfl_up_sync(kAllLanes, index, 1);
    const bool later_before = __shfl_up_sync(kAllLanes, static_cast<int>(later), 1) != 0;
    if (later) {
      const bool moves = lane > 0 && later_before;
      key = moves ? key_before : new_key;
      index = moves ? index_before : new_index;
    }
  }
};

}  // namespace h2rec::cuda
