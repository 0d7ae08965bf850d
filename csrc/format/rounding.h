// The int8 weight that a code stands for.
#pragma once

#include <cmath>
#include <cstdint>

#include "format/host_device.h"

namespace marlin_qqq::format {

// Per channel: W8 = 16 * code. The stored channel scale is the true one / 16.
MARLIN_QQQ_HOST_DEVICE constexpr int8_t channel_weight(int code) { return static_cast<int8_t>(16 * code); }

// Per group: W8 = round_half_even(code * group_scale). fp32 holds the product of a code and an fp16 exactly.
// Outside int8 the kernels keep the low byte (their fp16 trick holds that for |product| <= 512), so this form does too:
// the rounded product modulo 256. A product that is NaN or infinite gives 0; the format gives it no meaning.
MARLIN_QQQ_HOST_DEVICE inline int8_t group_weight(int code, float group_scale) {
  const float product = static_cast<float>(code) * group_scale;
  if (!(fabsf(product) <= 8.0F * 65504.0F)) {
    return 0;
  }
  const uint32_t low_byte = static_cast<uint32_t>(static_cast<int32_t>(rintf(product))) & 0xFFu;
  return static_cast<int8_t>(static_cast<int>(low_byte ^ 0x80u) - 0x80);
}

// The largest |code * group_scale| that rounds into int8 with either sign.
inline constexpr float kLargestGroupProduct = 127.5F;  // exclusive: a tie goes to 128

}  // namespace marlin_qqq::format
