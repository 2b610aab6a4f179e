// The launcher of csrc/cuda with a C interface, for ctypes. Its kernels run on the CPU.
#include "residual_quantize.cu"

extern "C" int h2rec_residual_quantize(const void* x, const void* codebooks, const std::int64_t* sizes, void* quantized,
                                       std::int32_t* codes, std::int64_t num_rows, std::int64_t dim, int num_levels,
                                       int dtype, bool vectorised) {
  return h2rec::cuda::residual_quantize({x, codebooks, sizes, quantized, codes, num_rows, dim, num_levels,
                                         static_cast<h2rec::cuda::Dtype>(dtype), vectorised},
                                        nullptr);
}
