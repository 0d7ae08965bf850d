// quantize_per_token.
#include <cmath>

#include "cpu/kernels.h"
#include "cpu/thread_pool.h"
#include "format/float16.h"
#include "format/token_quantization.h"

namespace marlin_qqq::cpu {
namespace {

float load(const void* x, InputType type, int64_t index) {
  switch (type) {
    case InputType::kFloat16:
      return format::float16_to_float(static_cast<const uint16_t*>(x)[index]);
    case InputType::kBFloat16:
      return format::bfloat16_to_float(static_cast<const uint16_t*>(x)[index]);
    case InputType::kFloat32:
      break;
  }
  return static_cast<const float*>(x)[index];
}

}  // namespace

void quantize_per_token(const void* x, InputType input_type, int64_t num_tokens, int64_t in_features,
                        int64_t row_stride, int8_t* quantized, float* token_scale, int num_threads) {
  auto quantize_row = [&](int64_t row) {
    uint32_t largest = 0;  // magnitudes order like their bits, NaN above infinity
    for (int64_t i = 0; i < in_features; ++i) {
      const uint32_t magnitude = format::float_bits(load(x, input_type, row * row_stride + i)) & 0x7FFFFFFFu;
      largest = magnitude > largest ? magnitude : largest;
    }
    const format::TokenScale scale = format::token_scale(format::float_from_bits(largest));
    token_scale[row] = scale.scale;
    for (int64_t i = 0; i < in_features; ++i) {
      quantized[row * in_features + i] =
          format::quantize_value(load(x, input_type, row * row_stride + i), scale.multiplier);
    }
  };
  parallel_for(num_tokens, num_threads, quantize_row);
}

}  // namespace marlin_qqq::cpu
