// quantize_per_token for one value, once the row's largest magnitude is known.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "format/float16.h"
#include "format/host_device.h"

namespace marlin_qqq::format {

// What a row of activations shares.
struct TokenScale {
  float scale;       // stored: amax / 127; 0 for a row of (near) zeros; NaN for a row with a NaN or an infinity
  float multiplier;  // 127 / amax; 0 where the whole row becomes zeros
};

// amax: the row's largest magnitude in fp32, NaN or infinity if the row holds one (any NaN must win).
MARLIN_QQQ_HOST_DEVICE inline TokenScale token_scale(float amax) {
  const uint32_t bits = float_bits(amax) & 0x7FFFFFFFu;
  if (bits >= 0x7F800000u) {
    return {float_from_bits(0x7FC00000u), 0.0F};
  }
#if defined(__CUDA_ARCH__)
  const float multiplier = __fdiv_rn(127.0F, amax);
  const float scale = __fdiv_rn(amax, 127.0F);
#else
  const float multiplier = 127.0F / amax;
  const float scale = amax / 127.0F;
#endif
  if (bits == 0u || float_bits(multiplier) >= 0x7F800000u) {  // 127 / amax is not finite
    return {0.0F, 0.0F};
  }
  return {scale, multiplier};
}

// saturate(round_half_even(value * multiplier)); a multiplier of 0 gives 0 whatever the value, NaN included.
MARLIN_QQQ_HOST_DEVICE inline int8_t quantize_value(float value, float multiplier) {
  if (multiplier == 0.0F) {
    return 0;
  }
#if defined(__CUDA_ARCH__)
  const float product = __fmul_rn(value, multiplier);
#else
  const float product = value * multiplier;
#endif
  const float rounded = rintf(product);
  return static_cast<int8_t>(rounded < -128.0F ? -128.0F : rounded > 127.0F ? 127.0F : rounded);
}

}  // namespace marlin_qqq::format
