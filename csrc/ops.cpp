// h2rec._C: the only C++ file that knows torch. It goes through the LibTorch stable ABI and the Python limited API, so
// that one binary serves torch >= 2.10 and CPython >= 3.10.
//
// The schemas of the operators are defined in h2rec/ops, so that everything traces without this binary; here kernels are
// registered for them (STABLE_TORCH_LIBRARY_IMPL). Only what has no meaning without the binary is defined here, as a
// fragment, because the namespace belongs to the Python side.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/capability.h"

#ifdef H2REC_WITH_CUDA
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <tuple>

#include "cuda/residual_quantize.h"
#endif

static std::string cpu_capability() { return h2rec::name_of(h2rec::capability()); }

STABLE_TORCH_LIBRARY_FRAGMENT(h2rec, m) { m.def("cpu_capability() -> str"); }

// No tensor argument says which device is meant, hence the key that serves all.
STABLE_TORCH_LIBRARY_IMPL(h2rec, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
}

#ifdef H2REC_WITH_CUDA
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Looked up at run time, for it lives in libtorch_cuda, and this binary serves a torch without CUDA as well.
static void* current_cuda_stream(std::int32_t device) {
  using Function = AOTITorchError (*)(std::int32_t, void**);
  static const auto get = reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
  STD_TORCH_CHECK(get != nullptr, "this build of torch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get(device, &stream));
  return stream;
}

static h2rec::cuda::Dtype cuda_dtype(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return h2rec::cuda::Dtype::kFloat64;
    case ScalarType::Half:
      return h2rec::cuda::Dtype::kFloat16;
    case ScalarType::BFloat16:
      return h2rec::cuda::Dtype::kBFloat16;
    default:
      STD_TORCH_CHECK(type == ScalarType::Float, "x must be float, double, half or bfloat16");
      return h2rec::cuda::Dtype::kFloat32;
  }
}

static std::tuple<Tensor, Tensor> cuda_residual_quantize(const Tensor& any_x, const Tensor& any_codebooks,
                                                         const Tensor& sizes) {
  const std::int32_t device = any_x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor x = torch::stable::contiguous(any_x), codebooks = torch::stable::contiguous(any_codebooks);
  const auto compute = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(codebooks.scalar_type() == compute, "codebooks must have the type of the arithmetic");
  STD_TORCH_CHECK(x.dim() == 2 && codebooks.dim() == 2 && x.size(1) == codebooks.size(1), "x [N, D], codebooks [M, D]");
  STD_TORCH_CHECK(sizes.scalar_type() == ScalarType::Long && sizes.is_contiguous(), "sizes must be int64");
  Tensor quantized = torch::stable::empty_like(x);
  Tensor codes = torch::stable::new_empty(x, {x.size(0), sizes.size(0)}, ScalarType::Int);
  const auto aligned = [](const Tensor& tensor) { return reinterpret_cast<std::uintptr_t>(tensor.data_ptr()) % 16 == 0; };
  const int error = h2rec::cuda::residual_quantize(
      {x.data_ptr(), codebooks.data_ptr(), static_cast<const std::int64_t*>(sizes.data_ptr()), quantized.data_ptr(),
       static_cast<std::int32_t*>(codes.data_ptr()), x.size(0), x.size(1), static_cast<int>(sizes.size(0)),
       cuda_dtype(x.scalar_type()), x.size(1) % 4 == 0 && aligned(x) && aligned(codebooks)},
      current_cuda_stream(device));
  STD_TORCH_CHECK(error == 0, "residual_quantize could not be started: cudaError ", error);
  return {quantized, codes};
}

STABLE_TORCH_LIBRARY_FRAGMENT(h2rec, m) {
  m.def("_cuda_residual_quantize(Tensor x, Tensor codebooks, Tensor sizes) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(h2rec, CUDA, m) { m.impl("_cuda_residual_quantize", TORCH_BOX(&cuda_residual_quantize)); }
#endif

// Importing the module loads the binary, and loading it registers: there is nothing else in it.
PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, 0, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
