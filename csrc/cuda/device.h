// What device code may use, and the only place that tells nvcc from a C++ compiler: there the emulation header of the
// tests (tests/cuda/cuda_emulation.h) takes the place of CUDA, and the same kernels run on the CPU.
#pragma once

#if defined(__CUDACC__)

#include <cuda_runtime.h>

// The block's dynamic shared memory.
#define H2REC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
// Starts a kernel; 0, or the error.
#define H2REC_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                                         \
  (kernel<<<(grid), (block), (shared_bytes), static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__), \
   static_cast<int>(cudaGetLastError()))

#else

#include "cuda_emulation.h"

#define H2REC_SHARED(name) unsigned char* name = ::cuda_emulation::shared_memory()
#define H2REC_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::cuda_emulation::launch((grid), (block), (shared_bytes), [&] { kernel(__VA_ARGS__); })

#endif
