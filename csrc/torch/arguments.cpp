#include "torch/arguments.h"

#include <utility>

#include "format/limits.h"

namespace marlin_qqq::torch_ops {
namespace {

constexpr const char* kGemm = "marlin_qqq_gemm";
constexpr const char* kQuantize = "quantize_per_token";
constexpr const char* kLinear = "marlin_qqq_linear";

using torch::headeronly::ScalarType;

// Checks of one op's arguments.
struct Checker {
  const char* op;
  const char* activations;  // name of the argument whose device the others must be on

  // None arrives as a tensor that is not defined, of which nothing else may be asked.
  void defined(const char* name, const Tensor& tensor, const char* hint = "") const {
    if (!tensor.defined()) fail(op, name, " must be a tensor, got None", hint);
  }

  void device(const char* name, const Tensor& tensor, int32_t device_type, int32_t device_index) const {
    const int32_t type = device_type_code(tensor);
    const int32_t index = tensor.get_device_index();
    if (type == device_type && index == device_index) return;
    fail(op, name, " must be on the device of ", activations, ", ", device_name(device_type, device_index), ", got ",
         device_name(type, index));
  }

  void dtype(const char* name, const Tensor& tensor, int32_t expected) const {
    const int32_t got = dtype_code(tensor);
    if (got != expected) fail(op, name, " must be ", dtype_name(expected), ", got ", dtype_name(got));
  }

  void rank_2(const char* name, const char* shape, const Tensor& tensor) const {
    if (tensor.dim() != 2) fail(op, name, " must have 2 dimensions, ", shape, ", got shape ", shape_name(tensor));
  }

  void numel(const char* name, const char* what, const Tensor& tensor, int64_t expected) const {
    if (tensor.numel() != expected) {
      fail(op, name, " must hold ", what, " = ", expected, " values, got shape ", shape_name(tensor));
    }
  }

  void contiguous(const char* name, const Tensor& tensor) const {
    if (tensor.is_contiguous()) return;
    std::ostringstream strides;
    for (int64_t i = 0; i < tensor.dim(); ++i) strides << (i == 0 ? "" : ", ") << tensor.stride(i);
    fail(op, name, " must be contiguous (row-major), got strides [", strides.str(), "] for shape ", shape_name(tensor),
         "; pass ", name, ".contiguous()");
  }

  const void* aligned_pointer(const char* name, const Tensor& tensor, int alignment) const {
    const void* pointer = tensor.const_data_ptr();
    const auto address = reinterpret_cast<uintptr_t>(pointer);
    if (address % static_cast<uintptr_t>(alignment) == 0) return pointer;
    fail(op, name, " must start at a multiple of ", alignment, " bytes, got an address that is ",
         address % static_cast<uintptr_t>(alignment), " past one (storage_offset ", tensor.storage_offset(), "); pass ",
         name, ".clone()");
  }

  void size_argument(const char* name, int64_t got, const char* tensor_size, int64_t expected) const {
    if (got != expected) fail(op, name, " must equal ", tensor_size, " = ", expected, ", got ", got);
  }
};

bool output_is_bfloat16(const char* op, const std::optional<ScalarType>& out_dtype, bool by_default) {
  if (!out_dtype.has_value()) return by_default;
  if (*out_dtype == ScalarType::Half) return false;
  if (*out_dtype == ScalarType::BFloat16) return true;
  fail(op, "out_dtype must be float16 or bfloat16, got ", dtype_name(*out_dtype));
}

// Presence, devices and dtypes of what every product has besides its activations: first, for the shapes of a wrong
// tensor mean little. Sets where the product lives and what it gives.
void check_kinds(const Checker& check, const Tensor& activations, const Tensor& b_q_weight, const Tensor& s_ch,
                 const Tensor& s_group, const std::optional<ScalarType>& out_dtype, bool bfloat16_by_default,
                 GemmCall& call) {
  const DtypeCodes& dtypes = dtype_codes();
  check.defined(check.activations, activations);
  check.defined("b_q_weight", b_q_weight);
  check.defined("s_ch", s_ch);
  check.defined("s_group", s_group, "; for per-channel weights pass a tensor without values");
  call.op = check.op;
  call.device_type = device_type_code(activations);
  call.device_index = activations.get_device_index();
  call.output_is_bfloat16 = output_is_bfloat16(check.op, out_dtype, bfloat16_by_default);
  check.device("b_q_weight", b_q_weight, call.device_type, call.device_index);
  check.device("s_ch", s_ch, call.device_type, call.device_index);
  check.device("s_group", s_group, call.device_type, call.device_index);
  check.dtype("b_q_weight", b_q_weight, dtypes.int32);
  check.dtype("s_ch", s_ch, dtypes.float32);
  check.dtype("s_group", s_group, dtypes.float16);
}

// Sizes of the product: call.num_tokens and call.in_features are known, the latter as `in_features_name`.
void check_sizes(const Checker& check, const Tensor& b_q_weight, const char* in_features_name, GemmCall& call) {
  check.rank_2("b_q_weight", "[in_features / 16, 2 * out_features]", b_q_weight);
  call.out_features = b_q_weight.size(1) / 2;
  if (call.in_features <= 0 || call.in_features % format::kInFeaturesMultiple != 0) {
    fail(check.op, "in_features (", in_features_name, ") must be a positive multiple of 128, got ", call.in_features);
  }
  if (call.in_features >= format::kInFeaturesLimit) {
    fail(check.op, "in_features (", in_features_name, ") must be below ", format::kInFeaturesLimit,
         ", where the int32 sum could overflow, got ", call.in_features);
  }
  if (b_q_weight.size(1) <= 0 || b_q_weight.size(1) % (2 * format::kOutFeaturesMultiple) != 0) {
    fail(check.op,
         "b_q_weight's second size must be 2 * out_features with out_features a positive multiple of 64, got ",
         b_q_weight.size(1));
  }
  if (b_q_weight.size(0) != call.in_features / 16) {
    fail(check.op, "b_q_weight's first size must be in_features / 16 = ", call.in_features / 16, ", got ",
         b_q_weight.size(0));
  }
  if (call.num_tokens > INT32_MAX) fail(check.op, "num_tokens must be below 2^31, got ", call.num_tokens);
}

// Weights, their scales and the bias, of a product whose sizes are known. `alignment`: as in check_gemm.
void check_weights(const Checker& check, const Tensor& b_q_weight, const Tensor& s_ch, const Tensor& s_group,
                   const std::optional<Tensor>& bias, int alignment, GemmCall& call) {
  check.numel("s_ch", "out_features", s_ch, call.out_features);
  const bool grouped = s_group.numel() != 0;
  call.group_size = grouped ? 128 : -1;
  if (grouped) {
    if (s_group.dim() != 2 || s_group.size(0) != call.in_features / 128 || s_group.size(1) != call.out_features) {
      fail(check.op, "s_group must have shape [in_features / 128, out_features] = [", call.in_features / 128, ", ",
           call.out_features, "] (group_size 128), or no values (per-channel), got ", shape_name(s_group));
    }
  }
  check.contiguous("b_q_weight", b_q_weight);
  check.contiguous("s_ch", s_ch);
  if (grouped) check.contiguous("s_group", s_group);
  call.packed_weight = static_cast<const int32_t*>(check.aligned_pointer("b_q_weight", b_q_weight, alignment));
  call.channel_scale = static_cast<const float*>(check.aligned_pointer("s_ch", s_ch, alignment));
  call.group_scale =
      grouped ? static_cast<const uint16_t*>(check.aligned_pointer("s_group", s_group, alignment)) : nullptr;

  call.bias = nullptr;
  if (bias.has_value()) {
    check.device("bias", *bias, call.device_type, call.device_index);
    const int32_t output_dtype = call.output_dtype();
    if (dtype_code(*bias) != output_dtype) {
      fail(check.op, "bias must have the output's dtype, ", dtype_name(output_dtype), ", got ",
           dtype_name(dtype_code(*bias)));
    }
    check.numel("bias", "out_features", *bias, call.out_features);
    check.contiguous("bias", *bias);
    call.bias = check.aligned_pointer("bias", *bias, alignment);
  }
}

}  // namespace

int32_t GemmCall::output_dtype() const {
  const DtypeCodes& dtypes = dtype_codes();
  return output_is_bfloat16 ? dtypes.bfloat16 : dtypes.float16;
}

Tensor GemmCall::empty_output() const {
  return empty(op, {num_tokens, out_features}, output_dtype(), device_type, device_index);
}

GemmCall check_gemm(const Tensor& a, const Tensor& b_q_weight, const Tensor& s_tok, const Tensor& s_ch,
                    const Tensor& s_group, const Tensor& workspace, int64_t size_m, int64_t size_n, int64_t size_k,
                    const std::optional<Tensor>& bias, const std::optional<ScalarType>& out_dtype, int alignment) {
  const Checker check{kGemm, "a"};
  const DtypeCodes& dtypes = dtype_codes();
  GemmCall call;
  check_kinds(check, a, b_q_weight, s_ch, s_group, out_dtype, /*bfloat16_by_default=*/false, call);
  check.defined("s_tok", s_tok);
  check.defined("workspace", workspace);
  check.device("s_tok", s_tok, call.device_type, call.device_index);
  check.device("workspace", workspace, call.device_type, call.device_index);
  check.dtype("a", a, dtypes.int8);
  check.dtype("s_tok", s_tok, dtypes.float32);
  check.dtype("workspace", workspace, dtypes.int32);

  check.rank_2("a", "[num_tokens, in_features]", a);
  call.num_tokens = a.size(0);
  call.in_features = a.size(1);
  check_sizes(check, b_q_weight, "a's second size", call);
  check.size_argument("size_m", size_m, "a.size(0)", call.num_tokens);
  check.size_argument("size_n", size_n, "b_q_weight.size(1) / 2", call.out_features);
  check.size_argument("size_k", size_k, "a.size(1)", call.in_features);

  check.numel("s_tok", "num_tokens", s_tok, call.num_tokens);
  check.contiguous("a", a);
  check.contiguous("s_tok", s_tok);
  check_weights(check, b_q_weight, s_ch, s_group, bias, alignment, call);
  // An empty tensor may have any address: nothing of it is read.
  const int activation_alignment = call.num_tokens == 0 ? 1 : alignment;
  call.activations = static_cast<const int8_t*>(check.aligned_pointer("a", a, activation_alignment));
  call.token_scale = static_cast<const float*>(s_tok.const_data_ptr());

  // Unused by these kernels, checked for the callers' other implementations.
  const int64_t workspace_needed = format::workspace_size(call.out_features);
  if (workspace.numel() < workspace_needed) {
    fail(kGemm, "workspace must hold at least out_features / 64 * 16 = ", workspace_needed, " int32 zeros, got ",
         workspace.numel(), " (see make_workspace)");
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

// x as rows. Rows that are contiguous and evenly spaced are read where they are; any other layout is copied.
TokenRows token_rows(const char* op, const Tensor& x) {
  const DtypeCodes& dtypes = dtype_codes();
  Checker{op, "x"}.defined("x", x);
  TokenRows rows;
  rows.op = op;
  rows.dtype = dtype_code(x);
  if (rows.dtype != dtypes.float16 && rows.dtype != dtypes.bfloat16 && rows.dtype != dtypes.float32) {
    fail(op, "x must be float16, bfloat16 or float32, got ", dtype_name(rows.dtype));
  }
  const int64_t rank = x.dim();
  if (rank < 1) fail(op, "x must have at least 1 dimension, [..., in_features], got a scalar");
  rows.in_features = x.size(rank - 1);
  rows.num_tokens = 1;
  for (int64_t i = 0; i + 1 < rank; ++i) rows.num_tokens *= x.size(i);
  rows.x = x;
  rows.row_stride = rows.num_tokens == 0 ? rows.in_features : uniform_row_stride(x);
  if (rows.row_stride < 0) {
    rows.x = contiguous_copy(op, x);
    rows.row_stride = rows.in_features;
  }
  return rows;
}

// A tensor of the rows' shape but for the last size.
Tensor empty_rows(const TokenRows& rows, int64_t last_size, int32_t dtype) {
  const Tensor& x = rows.x;
  std::vector<int64_t> sizes(x.dim());
  for (int64_t i = 0; i < x.dim(); ++i) sizes[i] = x.size(i);
  sizes.back() = last_size;
  return empty(rows.op, sizes.data(), x.dim(), dtype, device_type_code(x), x.get_device_index());
}

}  // namespace

QuantizeCall::QuantizeCall(const TokenRows& rows)
    : rows(rows),
      quantized(empty_rows(rows, rows.in_features, dtype_codes().int8)),
      token_scale(empty_rows(rows, 1, dtype_codes().float32)) {}

QuantizeCall check_quantize_per_token(const Tensor& x) { return QuantizeCall(token_rows(kQuantize, x)); }

void GemmCall::set_activations(const QuantizeCall& call) {
  activations = static_cast<const int8_t*>(call.quantized.const_data_ptr());
  token_scale = static_cast<const float*>(call.token_scale.const_data_ptr());
}

Tensor LinearCall::empty_output() const { return empty_rows(rows, gemm.out_features, gemm.output_dtype()); }

LinearCall check_linear(const Tensor& x, const Tensor& b_q_weight, const Tensor& s_ch, const Tensor& s_group,
                        const std::optional<Tensor>& bias, const std::optional<ScalarType>& out_dtype, int alignment) {
  const Checker check{kLinear, "x"};
  LinearCall call{token_rows(kLinear, x), {}};
  GemmCall& gemm = call.gemm;
  check_kinds(check, x, b_q_weight, s_ch, s_group, out_dtype, call.rows.dtype == dtype_codes().bfloat16, gemm);
  gemm.num_tokens = call.rows.num_tokens;
  gemm.in_features = call.rows.in_features;
  check_sizes(check, b_q_weight, "x's last size", gemm);
  check_weights(check, b_q_weight, s_ch, s_group, bias, alignment, gemm);
  return call;
}

}  // namespace marlin_qqq::torch_ops
