// From an exact int32 sum to one output value.
#pragma once

#include <cstdint>

#include "format/host_device.h"

namespace marlin_qqq::format {

// fp32(fp32(fp32(sum) * channel_scale) * token_scale): two rounded products in this order, no fused multiply-add.
// Compile with contraction off (-ffp-contract=off; nvcc: --fmad=false, or __fmul_rn as here).
MARLIN_QQQ_HOST_DEVICE inline float scaled_sum(int32_t sum, float channel_scale, float token_scale) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(__fmul_rn(__int2float_rn(sum), channel_scale), token_scale);
#else
  const float channel_scaled = static_cast<float>(sum) * channel_scale;
  return channel_scaled * token_scale;
#endif
}

// The bias joins in fp32, before the one rounding to the output type.
MARLIN_QQQ_HOST_DEVICE inline float biased(float value, float bias) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(value, bias);
#else
  return value + bias;
#endif
}

}  // namespace marlin_qqq::format
