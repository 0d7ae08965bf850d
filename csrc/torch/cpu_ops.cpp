// The CPU side of every op: unwrap tensors, call csrc/cpu, wrap the result.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "cpu/kernels.h"
#include "cpu/thread_pool.h"
#include "format/limits.h"
#include "torch/arguments.h"

namespace marlin_qqq::torch_ops {
namespace {

using torch::headeronly::ScalarType;

int num_threads() { return static_cast<int>(torch::stable::get_num_threads()); }

// csrc/cpu runs on torch's own threads: see thread_pool.h.
void lend_torch_threads(int threads, void (*body)(void*), void* context) {
  torch::stable::parallel_for(0, threads, 1, [body, context](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(context);
  });
}

[[maybe_unused]] const bool threads_are_lent = [] {
  cpu::borrow_threads(lend_torch_threads);
  return true;
}();

void multiply(const GemmCall& call, const Tensor& output) {
  if (call.num_tokens == 0) return;
  cpu::gemm(call.activations, call.packed_weight, call.token_scale, call.channel_scale, call.group_scale, call.bias,
            output.mutable_data_ptr(),
            call.output_is_bfloat16 ? format::OutputType::kBFloat16 : format::OutputType::kFloat16, call.num_tokens,
            call.out_features, call.in_features, num_threads());
}

void quantize(const QuantizeCall& call) {
  const TokenRows& rows = call.rows;
  if (rows.num_tokens == 0) return;
  const DtypeCodes& dtypes = dtype_codes();
  const format::InputType input_type = rows.dtype == dtypes.float16    ? format::InputType::kFloat16
                                       : rows.dtype == dtypes.bfloat16 ? format::InputType::kBFloat16
                                                                       : format::InputType::kFloat32;
  cpu::quantize_per_token(rows.x.const_data_ptr(), input_type, rows.num_tokens, rows.in_features, rows.row_stride,
                          static_cast<int8_t*>(call.quantized.mutable_data_ptr()),
                          static_cast<float*>(call.token_scale.mutable_data_ptr()), num_threads());
}

Tensor marlin_qqq_gemm_cpu(const Tensor& a, const Tensor& b_q_weight, const Tensor& s_tok, const Tensor& s_ch,
                           const Tensor& s_group, const Tensor& workspace, int64_t size_m, int64_t size_n,
                           int64_t size_k, const std::optional<Tensor>& bias,
                           const std::optional<ScalarType>& out_dtype, bool /*constant_weights*/) {
  const GemmCall call =
      check_gemm(a, b_q_weight, s_tok, s_ch, s_group, workspace, size_m, size_n, size_k, bias, out_dtype, 1);
  const Tensor output = call.empty_output();
  multiply(call, output);
  return output;
}

std::tuple<Tensor, Tensor> quantize_per_token_cpu(const Tensor& x) {
  const QuantizeCall call = check_quantize_per_token(x);
  quantize(call);
  return {call.quantized, call.token_scale};
}

Tensor marlin_qqq_linear_cpu(const Tensor& x, const Tensor& b_q_weight, const Tensor& s_ch, const Tensor& s_group,
                             const std::optional<Tensor>& bias, const std::optional<ScalarType>& out_dtype,
                             bool /*constant_weights*/) {
  LinearCall call = check_linear(x, b_q_weight, s_ch, s_group, bias, out_dtype, 1);
  const Tensor output = call.empty_output();
  const QuantizeCall activations(call.rows);
  quantize(activations);
  call.gemm.set_activations(activations);
  multiply(call.gemm, output);
  return output;
}

// Packing

bool is_grouped(const char* op, int64_t group_size) {
  if (group_size != format::kGroupSize && group_size != -1) {
    fail(op, "group_size must be 128 or -1 (per-channel), got ", group_size);
  }
  return group_size == format::kGroupSize;
}

// in_features must be whole tiles of 16, and whole groups where there are groups.
void check_packed_sizes(const char* op, int64_t in_features, int64_t out_features, bool grouped) {
  const int64_t in_multiple = grouped ? format::kGroupSize : format::kPackedInFeaturesMultiple;
  if (in_features <= 0 || in_features % in_multiple != 0) {
    fail(op, "in_features must be a positive multiple of ", in_multiple, grouped ? " (group_size 128)" : "", ", got ",
         in_features);
  }
  if (out_features <= 0 || out_features % format::kOutFeaturesMultiple != 0) {
    fail(op, "out_features must be a positive multiple of ", format::kOutFeaturesMultiple, ", got ", out_features);
  }
}

// A code outside [-8, 7] would silently change its value.
void check_codes(const int8_t* codes, int64_t in_features, int64_t out_features) {
  const int64_t count = in_features * out_features;
  const cpu::CodeRange range = cpu::code_range(codes, count, num_threads());
  if (range.minimum >= format::kMinCode && range.maximum <= format::kMaxCode) return;
  for (int64_t i = 0; i < count; ++i) {
    if (codes[i] < format::kMinCode || codes[i] > format::kMaxCode) {
      fail("pack_weight", "codes must be in [-8, 7], got ", static_cast<int>(codes[i]), " at [", i / out_features, ", ",
           i % out_features, "]");
    }
  }
}

Tensor pack_weight_cpu(const Tensor& codes, int64_t group_size) {
  constexpr const char* op = "pack_weight";
  const DtypeCodes& dtypes = dtype_codes();
  const bool grouped = is_grouped(op, group_size);
  if (dtype_code(codes) != dtypes.int8) fail(op, "codes must be int8, got ", dtype_name(dtype_code(codes)));
  if (codes.dim() != 2) {
    fail(op, "codes must have 2 dimensions, [in_features, out_features], got shape ", shape_name(codes));
  }
  const int64_t in_features = codes.size(0), out_features = codes.size(1);
  check_packed_sizes(op, in_features, out_features, grouped);
  const Tensor rows = codes.is_contiguous() ? codes : contiguous_copy(op, codes);
  const auto* data = static_cast<const int8_t*>(rows.const_data_ptr());
  check_codes(data, in_features, out_features);
  const Tensor packed = empty(op, {in_features / 16, 2 * out_features}, dtypes.int32, aoti_torch_device_type_cpu(), 0);
  cpu::pack_weight(data, in_features, out_features, grouped, static_cast<int32_t*>(packed.mutable_data_ptr()),
                   num_threads());
  return packed;
}

Tensor unpack_weight_cpu(const Tensor& packed, int64_t group_size) {
  constexpr const char* op = "unpack_weight";
  const DtypeCodes& dtypes = dtype_codes();
  const bool grouped = is_grouped(op, group_size);
  if (dtype_code(packed) != dtypes.int32) fail(op, "packed must be int32, got ", dtype_name(dtype_code(packed)));
  if (packed.dim() != 2) {
    fail(op, "packed must have 2 dimensions, [in_features / 16, 2 * out_features], got shape ", shape_name(packed));
  }
  if (packed.size(1) % 2 != 0) fail(op, "packed's second size must be 2 * out_features, got ", packed.size(1));
  const int64_t in_features = 16 * packed.size(0), out_features = packed.size(1) / 2;
  check_packed_sizes(op, in_features, out_features, grouped);
  const Tensor rows = packed.is_contiguous() ? packed : contiguous_copy(op, packed);
  const Tensor codes = empty(op, {in_features, out_features}, dtypes.int8, aoti_torch_device_type_cpu(), 0);
  cpu::unpack_weight(static_cast<const int32_t*>(rows.const_data_ptr()), in_features, out_features, grouped,
                     static_cast<int8_t*>(codes.mutable_data_ptr()), num_threads());
  return codes;
}

// Scale columns

Tensor reorder_scale(const char* op, const Tensor& scale, cpu::ScaleKind kind, bool to_stored) {
  const int64_t multiple = kind == cpu::ScaleKind::kGroup ? 64 : 32;  // a column stays within its block of so many
  const int64_t rank = scale.dim();
  if (rank < 1) fail(op, "scale must have at least 1 dimension, [..., out_features], got a scalar");
  const int64_t out_features = scale.size(rank - 1);
  if (out_features % multiple != 0) {
    fail(op, "scale's last size, out_features, must be a multiple of ", multiple, ", got ", out_features);
  }
  const auto element_bytes = static_cast<int>(scale.element_size());
  if (element_bytes != 2 && element_bytes != 4) {
    fail(op, "scale must have elements of 2 or 4 bytes (float16, bfloat16, float32), got ",
         dtype_name(dtype_code(scale)));
  }
  const Tensor input = scale.is_contiguous() ? scale : contiguous_copy(op, scale);
  std::vector<int64_t> sizes(rank);
  for (int64_t i = 0; i < rank; ++i) sizes[i] = scale.size(i);
  const Tensor output = empty(op, sizes.data(), rank, dtype_code(scale), aoti_torch_device_type_cpu(), 0);
  const int64_t rows = out_features == 0 ? 0 : scale.numel() / out_features;
  (to_stored ? cpu::permute_scale : cpu::unpermute_scale)(input.const_data_ptr(), kind, rows, out_features,
                                                          element_bytes, output.mutable_data_ptr());
  return output;
}

Tensor permute_group_scale_cpu(const Tensor& scale) {
  return reorder_scale("permute_group_scale", scale, cpu::ScaleKind::kGroup, true);
}

Tensor unpermute_group_scale_cpu(const Tensor& scale) {
  return reorder_scale("unpermute_group_scale", scale, cpu::ScaleKind::kGroup, false);
}

Tensor permute_channel_scale_cpu(const Tensor& scale) {
  return reorder_scale("permute_channel_scale", scale, cpu::ScaleKind::kChannel, true);
}

Tensor unpermute_channel_scale_cpu(const Tensor& scale) {
  return reorder_scale("unpermute_channel_scale", scale, cpu::ScaleKind::kChannel, false);
}

}  // namespace
}  // namespace marlin_qqq::torch_ops

STABLE_TORCH_LIBRARY_IMPL(marlin_qqq, CPU, library) {
  namespace ops = marlin_qqq::torch_ops;
  library.impl("marlin_qqq_gemm", TORCH_BOX(&ops::marlin_qqq_gemm_cpu));
  library.impl("quantize_per_token", TORCH_BOX(&ops::quantize_per_token_cpu));
  library.impl("marlin_qqq_linear", TORCH_BOX(&ops::marlin_qqq_linear_cpu));
  library.impl("pack_weight", TORCH_BOX(&ops::pack_weight_cpu));
  library.impl("unpack_weight", TORCH_BOX(&ops::unpack_weight_cpu));
  library.impl("permute_group_scale", TORCH_BOX(&ops::permute_group_scale_cpu));
  library.impl("unpermute_group_scale", TORCH_BOX(&ops::unpermute_group_scale_cpu));
  library.impl("permute_channel_scale", TORCH_BOX(&ops::permute_channel_scale_cpu));
  library.impl("unpermute_channel_scale", TORCH_BOX(&ops::unpermute_channel_scale_cpu));
}
