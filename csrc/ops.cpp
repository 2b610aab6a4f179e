// h2rec._C: the only C++ file that knows torch. It goes through the LibTorch stable ABI and the Python limited API, so
// that one binary serves torch >= 2.10 and CPython >= 3.10.
//
// The schemas of the operators are defined in h2rec/ops, so that everything traces without this binary; here kernels are
// registered for them (STABLE_TORCH_LIBRARY_IMPL). Only what has no meaning without the binary is defined here, as a
// fragment, because the namespace belongs to the Python side.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/alignment_loss.h"
#include "cpu/capability.h"
#include "cpu/harmonized_embedding.h"
#include "cpu/residual_quantize.h"

#ifdef H2REC_WITH_CUDA
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "cuda/residual_quantize.h"
#endif

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

static std::string cpu_capability() { return h2rec::name_of(h2rec::capability()); }

static void parallel_for(int64_t begin, int64_t end, int64_t grain, const h2rec::RangeFunction& range) {
  torch::stable::parallel_for(begin, end, grain, range);
}

template <typename T>
static const T* data_or_null(const OptionalTensor& tensor) {
  return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

// ---- alignment_loss: contiguous tensors of one floating dtype, int32 labels; h2rec/ops/_cpp.py brings them into this form

template <typename T>
static h2rec::AlignmentInputs<T> alignment_inputs(const Tensor& hash_emb, const Tensor& semantic_emb, double temperature,
                                                  const OptionalTensor& items, const OptionalTensor& codes,
                                                  int64_t min_shared_codes, const OptionalTensor& pair_start,
                                                  const OptionalTensor& pair_column, const OptionalTensor& pair_weight,
                                                  int64_t first_row, int64_t num_rows) {
  return {hash_emb.const_data_ptr<T>(),
          semantic_emb.const_data_ptr<T>(),
          hash_emb.size(0),
          hash_emb.size(1),
          temperature,
          data_or_null<int32_t>(items),
          data_or_null<int32_t>(codes),
          codes ? codes->size(0) : 0,
          min_shared_codes,
          data_or_null<int64_t>(pair_start),
          data_or_null<int32_t>(pair_column),
          data_or_null<T>(pair_weight),
          first_row,
          num_rows};
}

static std::tuple<Tensor, Tensor> alignment_loss(Tensor hash_emb, Tensor semantic_emb, double temperature,
                                                 OptionalTensor items, OptionalTensor codes, int64_t min_shared_codes,
                                                 OptionalTensor pair_start, OptionalTensor pair_column,
                                                 OptionalTensor pair_weight, int64_t first_row, int64_t num_rows) {
  Tensor row_sums = torch::stable::new_empty(hash_emb, {2, num_rows}, ScalarType::Double);
  Tensor column_sums = torch::stable::new_empty(hash_emb, {2, hash_emb.size(0)}, ScalarType::Double);
  const auto compute = [&]<typename T>() {
    h2rec::alignment_loss<T>(alignment_inputs<T>(hash_emb, semantic_emb, temperature, items, codes, min_shared_codes,
                                                 pair_start, pair_column, pair_weight, first_row, num_rows),
                             row_sums.mutable_data_ptr<double>(), column_sums.mutable_data_ptr<double>(), parallel_for);
  };
  hash_emb.scalar_type() == ScalarType::Double ? compute.operator()<double>() : compute.operator()<float>();
  return {row_sums, column_sums};
}

static std::tuple<Tensor, Tensor, double> alignment_loss_backward(
    Tensor grad_row_sums, Tensor grad_column_sums, Tensor row_sums, Tensor column_sums, Tensor hash_emb,
    Tensor semantic_emb, double temperature, OptionalTensor items, OptionalTensor codes, int64_t min_shared_codes,
    OptionalTensor pair_start, OptionalTensor pair_column, OptionalTensor pair_weight, int64_t first_row,
    int64_t num_rows) {
  Tensor grad_hash = torch::stable::new_empty(hash_emb, {num_rows, hash_emb.size(1)});
  Tensor grad_semantic = torch::stable::new_empty(hash_emb, {num_rows, hash_emb.size(1)});
  const h2rec::AlignmentLogSums sums{grad_row_sums.const_data_ptr<double>(), grad_column_sums.const_data_ptr<double>(),
                                     row_sums.const_data_ptr<double>(), column_sums.const_data_ptr<double>()};
  const auto compute = [&]<typename T>() {
    return h2rec::alignment_loss_backward<T>(
        alignment_inputs<T>(hash_emb, semantic_emb, temperature, items, codes, min_shared_codes, pair_start, pair_column,
                            pair_weight, first_row, num_rows),
        sums, grad_hash.mutable_data_ptr<T>(), grad_semantic.mutable_data_ptr<T>(), parallel_for);
  };
  const bool is_double = hash_emb.scalar_type() == ScalarType::Double;
  return {grad_hash, grad_semantic, is_double ? compute.operator()<double>() : compute.operator()<float>()};
}

static h2rec::FloatType float_type(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return h2rec::FloatType::kFloat32;
    case ScalarType::Double:
      return h2rec::FloatType::kFloat64;
    case ScalarType::BFloat16:
      return h2rec::FloatType::kBFloat16;
    case ScalarType::Half:
      return h2rec::FloatType::kFloat16;
    default:
      STD_TORCH_CHECK(false, "expected a tensor of float32, float64, bfloat16 or float16");
  }
}

// ---- residual_quantize: codebooks are contiguous, in the dtype of the arithmetic

static std::tuple<Tensor, Tensor> residual_quantize(const Tensor& x, const Tensor& codebooks,
                                                    const std::vector<int64_t>& sizes, int64_t beam_size) {
  const auto num_levels = static_cast<int64_t>(sizes.size());
  Tensor quantized = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  Tensor codes = torch::stable::new_empty(x, {x.size(0), num_levels}, ScalarType::Int);
  const h2rec::Vectors vectors{x.const_data_ptr(), float_type(x), x.size(0), x.size(1), x.stride(0), x.stride(1)};
  const h2rec::QuantizedVectors out{quantized.mutable_data_ptr(), codes.mutable_data_ptr<int32_t>()};
  const auto compute = [&]<typename T>() {
    h2rec::residual_quantize<T>(vectors, {codebooks.const_data_ptr<T>(), sizes.data(), num_levels}, beam_size, out,
                                parallel_for);
  };
  codebooks.scalar_type() == ScalarType::Double ? compute.operator()<double>() : compute.operator()<float>();
  return {quantized, codes};
}

// ---- harmonized_embedding: arguments that h2rec/ops has checked, in any integer and floating type

static h2rec::IntegerType integer_type(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Byte:
      return h2rec::IntegerType::kUInt8;
    case ScalarType::Char:
      return h2rec::IntegerType::kInt8;
    case ScalarType::Short:
      return h2rec::IntegerType::kInt16;
    case ScalarType::Int:
      return h2rec::IntegerType::kInt32;
    case ScalarType::Long:
      return h2rec::IntegerType::kInt64;
    default:
      STD_TORCH_CHECK(false, "expected an integer tensor");
  }
}

static Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// A matrix whose rows are contiguous: itself if they are, however far apart.
static Tensor with_contiguous_rows(const Tensor& matrix) {
  return matrix.stride(1) == 1 ? matrix : torch::stable::contiguous(matrix);
}

// The arguments that harmonized_embedding and its backward share, checked, with what must outlive the call.
struct HarmonizedEmbeddingArguments {
  Tensor item_ids;
  OptionalTensor constants;
  std::vector<int64_t> sizes;
  int64_t num_codewords = 0;
  h2rec::HarmonizedEmbedding op{};

  HarmonizedEmbeddingArguments(const Tensor& ids, const OptionalTensor& codes, std::vector<int64_t> level_sizes,
                               int64_t codebook_dim, int64_t num_rows, int64_t table_dim, const std::string& hash_mode,
                               const OptionalTensor& hash_constants, int64_t divisor, int64_t num_items,
                               const std::string& pooling, std::optional<int64_t> padding_idx,
                               const std::optional<std::string>& combine)
      : item_ids(as_contiguous(ids)), sizes(std::move(level_sizes)) {
    h2rec::ItemRows& items = op.items;
    items.item_ids = item_ids.data_ptr();
    items.id_type = integer_type(item_ids);
    items.num_items = num_items;
    items.padding_idx = padding_idx;
    op.num_tokens = item_ids.numel();
    op.codebook_dim = codebook_dim;
    op.table_dim = table_dim;
    op.pooling = pooling == "sum"    ? h2rec::Pooling::kSum
                 : pooling == "mean" ? h2rec::Pooling::kMean
                                     : h2rec::Pooling::kLevels;
    op.combine = !combine            ? h2rec::Combine::kNone
                 : *combine == "sum"  ? h2rec::Combine::kSum
                 : *combine == "mean" ? h2rec::Combine::kMean
                                      : h2rec::Combine::kConcat;
    if (codebook_dim > 0) {
      for (const int64_t size : sizes) {
        num_codewords += size;
      }
      STD_TORCH_CHECK(num_codewords <= INT32_MAX, "codebooks must have fewer than 2^31 rows, got ", num_codewords);
      items.sizes = sizes.data();
    }
    if (table_dim > 0) {
      set_hashing(hash_mode, hash_constants, divisor, num_rows);
    }
    if (items.sizes != nullptr || items.hash_mode == h2rec::HashMode::kPrefix) {
      set_codes(*codes);
    }
  }

 private:
  void set_hashing(const std::string& mode, const OptionalTensor& hash_constants, int64_t divisor, int64_t num_rows) {
    h2rec::ItemRows& items = op.items;
    items.num_rows = num_rows;
    items.divisor = divisor;
    items.num_hashes = 1;
    if (mode == "direct") {
      items.hash_mode = h2rec::HashMode::kDirect;
    } else if (mode == "qr") {
      items.hash_mode = h2rec::HashMode::kQuotientRemainder;
      items.num_hashes = 2;
    } else {
      items.hash_mode = mode == "multi" ? h2rec::HashMode::kMulti : h2rec::HashMode::kPrefix;
      constants = as_contiguous(*hash_constants);
      items.constants = static_cast<const int64_t*>(constants->data_ptr());
      items.num_hashes = constants->size(0);
    }
  }

  void set_codes(const Tensor& codes) {
    h2rec::ItemRows& items = op.items;
    items.codes = codes.data_ptr();
    items.code_type = integer_type(codes);
    items.code_strides[0] = codes.stride(0);
    items.code_strides[1] = codes.stride(1);
    items.num_levels = codes.size(1);
  }
};

// Returns (semantic or combined, hashed, h2rec::Fault).
static std::tuple<Tensor, Tensor, int64_t> harmonized_embedding(
    Tensor item_ids, OptionalTensor codes, OptionalTensor codebooks, std::vector<int64_t> sizes, OptionalTensor table,
    std::string hash_mode, OptionalTensor hash_constants, int64_t divisor, int64_t num_items, std::string pooling,
    std::optional<int64_t> padding_idx, std::optional<std::string> combine) {
  if (codebooks) {
    codebooks = with_contiguous_rows(*codebooks);
  }
  if (table) {
    table = with_contiguous_rows(*table);
  }
  const auto size_of = [](const OptionalTensor& matrix, int64_t dim) { return matrix ? matrix->size(dim) : 0; };
  const auto num_levels = static_cast<int64_t>(sizes.size());
  const int64_t codebook_dim = size_of(codebooks, 1), table_dim = size_of(table, 1);
  HarmonizedEmbeddingArguments arguments(item_ids, codes, std::move(sizes), codebook_dim, size_of(table, 0), table_dim,
                                         hash_mode, hash_constants, divisor, num_items, pooling, padding_idx, combine);
  h2rec::HarmonizedEmbedding& op = arguments.op;
  const Tensor& like = codebooks ? *codebooks : *table;
  op.type = float_type(like);

  std::vector<int64_t> shape(item_ids.sizes().begin(), item_ids.sizes().end());
  const auto new_output = [&](std::vector<int64_t> per_token) {
    per_token.insert(per_token.begin(), shape.begin(), shape.end());
    return torch::stable::new_empty(like, per_token);
  };
  const int64_t semantic_width = codebook_dim * (op.pooling == h2rec::Pooling::kLevels ? num_levels : 1);
  op.first_width = semantic_width + (op.combine == h2rec::Combine::kConcat ? table_dim : 0);
  const bool apart = op.combine == h2rec::Combine::kNone;
  const auto absent = [&] { return torch::stable::new_empty(like, {0}); };
  Tensor first = !codebooks             ? absent()
                 : pooling == "levels" ? new_output({num_levels, codebook_dim})
                                       : new_output({op.first_width});
  Tensor hashed = table && apart ? new_output({table_dim}) : absent();

  const auto rows_of = [](const OptionalTensor& matrix) {
    return matrix ? h2rec::Rows{matrix->data_ptr(), matrix->stride(0)} : h2rec::Rows{};
  };
  const h2rec::Fault fault = h2rec::harmonized_embedding(op, rows_of(codebooks), rows_of(table), first.data_ptr(),
                                                         hashed.data_ptr(), parallel_for);
  return {first, hashed, static_cast<int64_t>(fault)};
}

// Returns the gradients of the codebooks and of the table, and with `sparse` the table's rows.
static std::tuple<Tensor, Tensor, Tensor> harmonized_embedding_backward(
    OptionalTensor grad_first, OptionalTensor grad_hashed, Tensor item_ids, OptionalTensor codes,
    std::vector<int64_t> sizes, int64_t codebook_dim, int64_t num_rows, int64_t table_dim, std::string hash_mode,
    OptionalTensor hash_constants, int64_t divisor, int64_t num_items, std::string pooling,
    std::optional<int64_t> padding_idx, std::optional<std::string> combine, bool sparse) {
  if (grad_first) {
    grad_first = as_contiguous(*grad_first);
  }
  if (grad_hashed) {
    grad_hashed = as_contiguous(*grad_hashed);
  }
  HarmonizedEmbeddingArguments arguments(item_ids, codes, std::move(sizes), codebook_dim, num_rows,
                                         num_rows > 0 ? table_dim : 0, hash_mode, hash_constants, divisor, num_items,
                                         pooling, padding_idx, combine);
  h2rec::HarmonizedEmbedding& op = arguments.op;
  const Tensor& like = grad_first ? *grad_first : *grad_hashed;
  op.type = float_type(like);
  op.first_width = grad_first && op.num_tokens > 0 ? grad_first->numel() / op.num_tokens : 0;
  const h2rec::HarmonizedEmbeddingBackward backward(op, grad_first ? grad_first->data_ptr() : nullptr,
                                                    grad_hashed ? grad_hashed->data_ptr() : nullptr, parallel_for);

  const Tensor absent = torch::stable::new_empty(like, {0});
  Tensor grad_codebooks = absent, grad_table = absent;
  Tensor rows = torch::stable::new_empty(item_ids, {0}, ScalarType::Long);
  if (op.codebook_dim > 0) {
    grad_codebooks = torch::stable::new_empty(like, {arguments.num_codewords, codebook_dim});
    backward.codebooks(grad_codebooks.data_ptr());
  }
  if (op.table_dim > 0 && sparse) {
    rows = torch::stable::new_empty(item_ids, {backward.num_read_rows()}, ScalarType::Long);
    grad_table = torch::stable::new_empty(like, {backward.num_read_rows(), table_dim});
    backward.sparse_table(grad_table.data_ptr(), static_cast<int64_t*>(rows.data_ptr()));
  } else if (op.table_dim > 0) {
    grad_table = torch::stable::new_empty(like, {num_rows, table_dim});
    backward.table(grad_table.data_ptr());
  }
  return {grad_codebooks, grad_table, rows};
}

STABLE_TORCH_LIBRARY_FRAGMENT(h2rec, m) {
  m.def("cpu_capability() -> str");
  m.def(
      "_cpp_alignment_loss(Tensor hash_emb, Tensor semantic_emb, float temperature, Tensor? items, Tensor? codes, "
      "int min_shared_codes, Tensor? pair_start, Tensor? pair_column, Tensor? pair_weight, int first_row, int num_rows) "
      "-> (Tensor, Tensor)");
  m.def(
      "_cpp_alignment_loss_backward(Tensor grad_row_sums, Tensor grad_column_sums, Tensor row_sums, Tensor column_sums, "
      "Tensor hash_emb, Tensor semantic_emb, float temperature, Tensor? items, Tensor? codes, int min_shared_codes, "
      "Tensor? pair_start, Tensor? pair_column, Tensor? pair_weight, int first_row, int num_rows) "
      "-> (Tensor, Tensor, float)");
  m.def("_cpp_residual_quantize(Tensor x, Tensor codebooks, int[] sizes, int beam_size) -> (Tensor, Tensor)");
  m.def(
      "_cpp_harmonized_embedding(Tensor item_ids, Tensor? codes, Tensor? codebooks, int[] sizes, Tensor? hash_table, "
      "str hash_mode, Tensor? hash_constants, int divisor, int num_items, str pooling, int? padding_idx, str? combine) "
      "-> (Tensor, Tensor, int)");
  m.def(
      "_cpp_harmonized_embedding_backward(Tensor? grad_first, Tensor? grad_hashed, Tensor item_ids, Tensor? codes, "
      "int[] sizes, int codebook_dim, int num_rows, int hash_dim, str hash_mode, Tensor? hash_constants, int divisor, "
      "int num_items, str pooling, int? padding_idx, str? combine, bool sparse) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(h2rec, CPU, m) {
  m.impl("_cpp_alignment_loss", TORCH_BOX(&alignment_loss));
  m.impl("_cpp_alignment_loss_backward", TORCH_BOX(&alignment_loss_backward));
  m.impl("_cpp_residual_quantize", TORCH_BOX(&residual_quantize));
  m.impl("_cpp_harmonized_embedding", TORCH_BOX(&harmonized_embedding));
  m.impl("_cpp_harmonized_embedding_backward", TORCH_BOX(&harmonized_embedding_backward));
}

// No tensor argument says which device is meant, hence the key that serves all.
STABLE_TORCH_LIBRARY_IMPL(h2rec, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
}

#ifdef H2REC_WITH_CUDA
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

// codebooks are contiguous, in the dtype of the arithmetic.
static std::tuple<Tensor, Tensor> cuda_residual_quantize(Tensor x, Tensor codebooks, std::vector<int64_t> sizes,
                                                         int64_t beam_size) {
  STD_TORCH_CHECK(beam_size <= h2rec::cuda::kMaxBeamSize, "beam_size must be at most ", h2rec::cuda::kMaxBeamSize);
  STD_TORCH_CHECK(codebooks.size(0) < INT32_MAX / beam_size, "codebooks have too many rows: ", codebooks.size(0));
  const std::int32_t device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const auto num_levels = static_cast<int>(sizes.size());
  Tensor quantized = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  Tensor codes = torch::stable::new_empty(x, {x.size(0), num_levels}, ScalarType::Int);
  const h2rec::cuda::ResidualQuantizeArgs args{
      h2rec::cuda::make_rows(x.data_ptr(), cuda_dtype(x.scalar_type()), x.stride(0), x.stride(1), x.size(1)),
      x.size(0),
      codebooks.data_ptr(),
      sizes.data(),
      num_levels,
      cuda_dtype(codebooks.scalar_type()),
      quantized.data_ptr(),
      codes.mutable_data_ptr<int32_t>()};
  const h2rec::cuda::ResidualQuantizePlan plan = h2rec::cuda::plan_residual_quantize(args, static_cast<int>(beam_size));
  Tensor workspace = torch::stable::new_empty(x, {h2rec::cuda::workspace_bytes(args, plan)}, ScalarType::Byte);
  const int error =
      h2rec::cuda::residual_quantize(args, plan, workspace.data_ptr(), current_cuda_stream(device));
  STD_TORCH_CHECK(error == 0, "residual_quantize could not be started: cudaError ", error);
  return {quantized, codes};
}

STABLE_TORCH_LIBRARY_FRAGMENT(h2rec, m) {
  m.def("_cuda_residual_quantize(Tensor x, Tensor codebooks, int[] sizes, int beam_size) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(h2rec, CUDA, m) { m.impl("_cuda_residual_quantize", TORCH_BOX(&cuda_residual_quantize)); }
#endif

// Importing the module loads the binary, and loading it registers: there is nothing else in it.
PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, 0, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
