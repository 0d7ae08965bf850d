#include "torch/arguments.h"

#include <torch/csrc/stable/ops.h>

#include <utility>

#include "format/limits.h"

namespace marlin_qqq::torch_ops {
namespace {

constexpr const char* kGemm = "marlin_qqq_gemm";
constexpr const char* kQuantize = "quantize_per_token";

using torch::headeronly::ScalarType;

void check_device(const char* name, const Tensor& tensor, int32_t device_type, int32_t device_index) {
  const int32_t type = device_type_code(tensor);
  const int32_t index = tensor.get_device_index();
  if (type == device_type && index == device_index) return;
  fail(kGemm, name, " must be on the device of a, ", device_name(device_type, device_index), ", got ",
       device_name(type, index));
}

void check_dtype(const char* name, const Tensor& tensor, int32_t expected) {
  const int32_t got = dtype_code(tensor);
  if (got != expected) fail(kGemm, name, " must be ", dtype_name(expected), ", got ", dtype_name(got));
}

void check_rank_2(const char* name, const char* shape, const Tensor& tensor) {
  if (tensor.dim() != 2) fail(kGemm, name, " must have 2 dimensions, ", shape, ", got shape ", shape_name(tensor));
}

void check_numel(const char* name, const char* what, const Tensor& tensor, int64_t expected) {
  if (tensor.numel() != expected) {
    fail(kGemm, name, " must hold ", what, " = ", expected, " values, got shape ", shape_name(tensor));
  }
}

void check_contiguous(const char* name, const Tensor& tensor) {
  if (tensor.is_contiguous()) return;
  std::ostringstream strides;
  for (int64_t i = 0; i < tensor.dim(); ++i) strides << (i == 0 ? "" : ", ") << tensor.stride(i);
  fail(kGemm, name, " must be contiguous (row-major), got strides [", strides.str(), "] for shape ", shape_name(tensor),
       "; pass ", name, ".contiguous()");
}

const void* aligned_pointer(const char* name, const Tensor& tensor, int alignment) {
  const void* pointer = tensor.const_data_ptr();
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  if (address % static_cast<uintptr_t>(alignment) == 0) return pointer;
  fail(kGemm, name, " must start at a multiple of ", alignment, " bytes, got an address that is ",
       address % static_cast<uintptr_t>(alignment), " past one (storage_offset ", tensor.storage_offset(), "); pass ",
       name, ".clone()");
}

void check_size_argument(const char* name, int64_t got, const char* tensor_size, int64_t expected) {
  if (got != expected) fail(kGemm, name, " must equal ", tensor_size, " = ", expected, ", got ", got);
}

bool output_is_bfloat16(const std::optional<ScalarType>& out_dtype) {
  if (!out_dtype.has_value() || *out_dtype == ScalarType::Half) return false;
  if (*out_dtype == ScalarType::BFloat16) return true;
  fail(kGemm, "out_dtype must be float16 or bfloat16, got torch's ", torch::headeronly::toString(*out_dtype));
}

}  // namespace

Tensor GemmCall::empty_output() const {
  const DtypeCodes& dtypes = dtype_codes();
  return empty({num_tokens, out_features}, output_is_bfloat16 ? dtypes.bfloat16 : dtypes.float16, device_type,
               device_index);
}

GemmCall check_gemm(const Tensor& a, const Tensor& b_q_weight, const Tensor& s_tok, const Tensor& s_ch,
                    const Tensor& s_group, const Tensor& workspace, int64_t size_m, int64_t size_n, int64_t size_k,
                    const std::optional<Tensor>& bias, const std::optional<ScalarType>& out_dtype, int alignment) {
  const DtypeCodes& dtypes = dtype_codes();
  GemmCall call;
  call.device_type = device_type_code(a);
  call.device_index = a.get_device_index();
  call.output_is_bfloat16 = output_is_bfloat16(out_dtype);

  // Devices and dtypes first: the shapes of a wrong tensor mean little.
  check_device("b_q_weight", b_q_weight, call.device_type, call.device_index);
  check_device("s_tok", s_tok, call.device_type, call.device_index);
  check_device("s_ch", s_ch, call.device_type, call.device_index);
  check_device("s_group", s_group, call.device_type, call.device_index);
  check_device("workspace", workspace, call.device_type, call.device_index);
  check_dtype("a", a, dtypes.int8);
  check_dtype("b_q_weight", b_q_weight, dtypes.int32);
  check_dtype("s_tok", s_tok, dtypes.float32);
  check_dtype("s_ch", s_ch, dtypes.float32);
  check_dtype("s_group", s_group, dtypes.float16);
  check_dtype("workspace", workspace, dtypes.int32);

  // The problem
  check_rank_2("a", "[num_tokens, in_features]", a);
  check_rank_2("b_q_weight", "[in_features / 16, 2 * out_features]", b_q_weight);
  call.num_tokens = a.size(0);
  call.in_features = a.size(1);
  call.out_features = b_q_weight.size(1) / 2;
  if (call.in_features <= 0 || call.in_features % format::kInFeaturesMultiple != 0) {
    fail(kGemm, "in_features (a's second size) must be a positive multiple of 128, got ", call.in_features);
  }
  if (call.in_features >= format::kInFeaturesLimit) {
    fail(kGemm, "in_features (a's second size) must be below ", format::kInFeaturesLimit,
         ", where the int32 sum could overflow, got ", call.in_features);
  }
  if (b_q_weight.size(1) <= 0 || b_q_weight.size(1) % (2 * format::kOutFeaturesMultiple) != 0) {
    fail(kGemm, "b_q_weight's second size must be 2 * out_features with out_features a positive multiple of 64, got ",
         b_q_weight.size(1));
  }
  if (b_q_weight.size(0) != call.in_features / 16) {
    fail(kGemm, "b_q_weight's first size must be in_features / 16 = ", call.in_features / 16, ", got ",
         b_q_weight.size(0));
  }
  check_size_argument("size_m", size_m, "a.size(0)", call.num_tokens);
  check_size_argument("size_n", size_n, "b_q_weight.size(1) / 2", call.out_features);
  check_size_argument("size_k", size_k, "a.size(1)", call.in_features);
  if (call.num_tokens > INT32_MAX) fail(kGemm, "num_tokens must be below 2^31, got ", call.num_tokens);

  // Scales
  check_numel("s_tok", "num_tokens", s_tok, call.num_tokens);
  check_numel("s_ch", "out_features", s_ch, call.out_features);
  const bool grouped = s_group.numel() != 0;
  call.group_size = grouped ? 128 : -1;
  if (grouped) {
    if (s_group.dim() != 2 || s_group.size(0) != call.in_features / 128 || s_group.size(1) != call.out_features) {
      fail(kGemm, "s_group must have shape [in_features / 128, out_features] = [", call.in_features / 128, ", ",
           call.out_features, "] (group_size 128), or no values (per-channel), got ", shape_name(s_group));
    }
  }

  // Workspace: unused by these kernels, checked for the callers' other implementations
  const int64_t workspace_needed = format::workspace_size(call.out_features);
  if (workspace.numel() < workspace_needed) {
    fail(kGemm, "workspace must hold at least out_features / 64 * 16 = ", workspace_needed, " int32 zeros, got ",
         workspace.numel(), " (see make_workspace)");
  }

  check_contiguous("a", a);
  check_contiguous("b_q_weight", b_q_weight);
  check_contiguous("s_tok", s_tok);
  check_contiguous("s_ch", s_ch);
  if (grouped) check_contiguous("s_group", s_group);

  // An empty tensor may have any address: nothing of it is read.
  const int activation_alignment = call.num_tokens == 0 ? 1 : alignment;
  call.activations = static_cast<const int8_t*>(aligned_pointer("a", a, activation_alignment));
  call.packed_weight = static_cast<const int32_t*>(aligned_pointer("b_q_weight", b_q_weight, alignment));
  call.token_scale = static_cast<const float*>(s_tok.const_data_ptr());
  call.channel_scale = static_cast<const float*>(aligned_pointer("s_ch", s_ch, alignment));
  call.group_scale = grouped ? static_cast<const uint16_t*>(aligned_pointer("s_group", s_group, alignment)) : nullptr;

  call.bias = nullptr;
  if (bias.has_value()) {
    check_device("bias", *bias, call.device_type, call.device_index);
    const int32_t output_dtype = call.output_is_bfloat16 ? dtypes.bfloat16 : dtypes.float16;
    if (dtype_code(*bias) != output_dtype) {
      fail(kGemm, "bias must have the output's dtype, ", dtype_name(output_dtype), ", got ",
           dtype_name(dtype_code(*bias)));
    }
    check_numel("bias", "out_features", *bias, call.out_features);
    check_contiguous("bias", *bias);
    call.bias = aligned_pointer("bias", *bias, alignment);
  }
  return call;
}

namespace {

// The distance of neighbouring rows when all leading dimensions are evenly spaced, or -1 when they are not.
int64_t uniform_row_stride(const Tensor& x) {
  const int64_t rank = x.dim();
  if (x.size(rank - 1) > 1 && x.stride(rank - 1) != 1) return -1;
  int64_t row_stride = -1;  // of the innermost leading dimension with more than one index
  int64_t expected = 0;     // stride that the next dimension outwards must have
  for (int64_t i = rank - 2; i >= 0; --i) {
    if (x.size(i) == 1) continue;
    if (row_stride < 0) {
      row_stride = x.stride(i);
    } else if (x.stride(i) != expected) {
      return -1;
    }
    expected = x.stride(i) * x.size(i);
  }
  return row_stride < 0 ? x.size(rank - 1) : row_stride;
}

}  // namespace

QuantizeCall check_quantize_per_token(const Tensor& x) {
  const DtypeCodes& dtypes = dtype_codes();
  QuantizeCall call;
  call.dtype = dtype_code(x);
  if (call.dtype != dtypes.float16 && call.dtype != dtypes.bfloat16 && call.dtype != dtypes.float32) {
    fail(kQuantize, "x must be float16, bfloat16 or float32, got ", dtype_name(call.dtype));
  }
  const int64_t rank = x.dim();
  if (rank < 1) fail(kQuantize, "x must have at least 1 dimension, [..., in_features], got a scalar");

  std::vector<int64_t> sizes(rank);
  for (int64_t i = 0; i < rank; ++i) sizes[i] = x.size(i);
  call.in_features = sizes[rank - 1];
  call.num_tokens = 1;
  for (int64_t i = 0; i + 1 < rank; ++i) call.num_tokens *= sizes[i];

  const int32_t device_type = device_type_code(x);
  const int32_t device_index = x.get_device_index();
  call.quantized = empty(sizes.data(), rank, dtypes.int8, device_type, device_index);
  sizes[rank - 1] = 1;
  call.token_scale = empty(sizes.data(), rank, dtypes.float32, device_type, device_index);

  call.x = x;
  call.row_stride = call.num_tokens == 0 ? call.in_features : uniform_row_stride(x);
  if (call.row_stride < 0) {
    call.x = torch::stable::contiguous(x);
    call.row_stride = call.in_features;
  }
  return call;
}

}  // namespace marlin_qqq::torch_ops
