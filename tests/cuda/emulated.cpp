// The launcher of csrc/cuda with a C interface, for ctypes. Its kernels run on the CPU.
#include <cstring>
#include <vector>

#include "residual_quantize.cu"

// `tables` and `capacity` replace what the plan says, unless they are negative.
extern "C" int h2rec_residual_quantize(const void* x, int dtype, std::int64_t row_stride, std::int64_t column_stride,
                                       std::int64_t num_rows, std::int64_t dim, const void* codebooks,
                                       const std::int64_t* sizes, int num_levels, int compute, int beam_size,
                                       int tables, int capacity, void* quantized, std::int32_t* codes) {
  using namespace h2rec::cuda;
  const ResidualQuantizeArgs args{make_rows(x, static_cast<Dtype>(dtype), row_stride, column_stride, dim), num_rows,
                                  codebooks, sizes, num_levels, static_cast<Dtype>(compute), quantized, codes};
  ResidualQuantizePlan plan = plan_residual_quantize(args, beam_size);
  plan.tables = tables < 0 ? plan.tables : tables > 0;
  plan.capacity = capacity < 0 ? plan.capacity : capacity;
  struct alignas(256) Line {
    unsigned char bytes[256];
  };
  std::vector<Line> workspace(static_cast<std::size_t>(workspace_bytes(args, plan)) / sizeof(Line));
  if (!workspace.empty()) {
    std::memset(workspace.data(), 0xff, workspace.size() * sizeof(Line));  // NaN
  }
  return residual_quantize(args, plan, workspace.data(), nullptr);
}

extern "C" void h2rec_plan_residual_quantize(std::int64_t num_rows, std::int64_t dim, const std::int64_t* sizes,
                                             int num_levels, int beam_size, bool* tables, std::int64_t* bytes) {
  using namespace h2rec::cuda;
  const ResidualQuantizeArgs args{make_rows(nullptr, Dtype::kFloat32, dim, 1, dim), num_rows, nullptr, sizes, num_levels,
                                  Dtype::kFloat32, nullptr, nullptr};
  const ResidualQuantizePlan plan = plan_residual_quantize(args, beam_size);
  *tables = plan.tables;
  *bytes = workspace_bytes(args, plan);
}
