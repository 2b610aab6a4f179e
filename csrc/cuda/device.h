// What device code may use, and the only place that tells nvcc from a C++ compiler: there the emulation header of the
// tests (tests/cuda/cuda_emulation.h) takes the place of CUDA, and the same kernels run on the CPU.
#pragma once

#if defined(__CUDACC__)

#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>
#include <mma.h>

// The block's dynamic shared memory.
#define H2REC_SHARED(name) extern __shared__ __align__(32) unsigned char name[]
// Starts a kernel; 0, or the error.
#define H2REC_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                                         \
  (kernel<<<(grid), (block), (shared_bytes), static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__), \
   static_cast<int>(cudaGetLastError()))

namespace h2rec::cuda {
// Of the current device.
inline int multiprocessors() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count > 0 ? count : 1;
}
}  // namespace h2rec::cuda

#else

#include "cuda_emulation.h"

#define H2REC_SHARED(name) unsigned char* name = ::cuda_emulation::shared_memory()
#define H2REC_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::cuda_emulation::launch((grid), (block), (shared_bytes), [&] { kernel(__VA_ARGS__); })

namespace h2rec::cuda {
inline int multiprocessors() { return 1; }  // so that its blocks have more than one tile to do
}  // namespace h2rec::cuda

#endif
