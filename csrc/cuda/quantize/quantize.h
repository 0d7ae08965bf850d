// quantize_per_token on the GPU, free of torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace marlin_qqq::cuda {

enum class InputType { kFloat16, kBFloat16, kFloat32 };

// x: [num_tokens, in_features], rows contiguous and row_stride elements apart -> quantized int8
// [num_tokens, in_features] contiguous and token_scale fp32 [num_tokens] (amax / 127). Any in_features >= 0, any
// alignment that the element type has. Rounding and special rows: spec of quantize_per_token in docs/format.md.
cudaError_t launch_quantize_per_token(const void* x, InputType input_type, int64_t num_tokens, int64_t in_features,
                                      int64_t row_stride, int8_t* quantized, float* token_scale, cudaStream_t stream);

}  // namespace marlin_qqq::cuda
