// Threads come from torch: csrc/ops.cpp hands its parallel_for to the kernels, which know only this.
#pragma once

#include <cstdint>
#include <functional>

namespace h2rec {

using RangeFunction = std::function<void(std::int64_t begin, std::int64_t end)>;

// Calls `range` on consecutive parts of [begin, end) of at least `grain` elements each, on several threads, and returns when
// all are done.
using ParallelFor = void (*)(std::int64_t begin, std::int64_t end, std::int64_t grain, const RangeFunction& range);

}  // namespace h2rec
