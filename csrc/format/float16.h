// fp16 and bf16 as their 16 bits, converted without hardware support: round to nearest even, overflow to infinity,
// NaN stays NaN. Kernels with conversion instructions must agree with these.
#pragma once

#include <cstdint>
#include <cstring>

#include "format/host_device.h"
#include "format/types.h"

namespace marlin_qqq::format {

MARLIN_QQQ_HOST_DEVICE inline uint32_t float_bits(float value) {
  uint32_t bits = 0;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

MARLIN_QQQ_HOST_DEVICE inline float float_from_bits(uint32_t bits) {
  float value = 0.0F;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

MARLIN_QQQ_HOST_DEVICE inline uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = float_bits(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) {
    return static_cast<uint16_t>((bits >> 16) | 0x0040u);  // quiet, sign and the upper payload kept
  }
  return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

MARLIN_QQQ_HOST_DEVICE inline float bfloat16_to_float(uint16_t bits) {
  return float_from_bits(static_cast<uint32_t>(bits) << 16);
}

MARLIN_QQQ_HOST_DEVICE inline uint16_t float_to_float16(float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) {  // NaN: quiet, upper payload kept
    return static_cast<uint16_t>(sign | 0x7E00u | ((magnitude >> 13) & 0x3FFu));
  }
  if (magnitude >= 0x47800000u) {  // 65536 and above; the values from 65520 on carry into infinity below
    return static_cast<uint16_t>(sign | 0x7C00u);
  }
  if (magnitude >= 0x38800000u) {  // normal: rebias the exponent, drop 13 bits of the mantissa
    const uint32_t rebiased = magnitude - 0x38000000u;
    return static_cast<uint16_t>(sign | ((rebiased + 0xFFFu + ((rebiased >> 13) & 1u)) >> 13));
  }
  if (magnitude < 0x33000000u) {  // below half of the smallest subnormal
    return static_cast<uint16_t>(sign);
  }
  // Subnormal: the mantissa in units of 2^-24.
  const uint32_t shift = 126u - (magnitude >> 23);  // 14..24
  const uint32_t mantissa = (magnitude & 0x7FFFFFu) | 0x800000u;
  const uint32_t kept = mantissa >> shift;
  const uint32_t rest = mantissa & ((1u << shift) - 1u);
  const uint32_t half = 1u << (shift - 1u);
  const uint32_t up = (rest > half || (rest == half && (kept & 1u) != 0u)) ? 1u : 0u;
  return static_cast<uint16_t>(sign | (kept + up));
}

MARLIN_QQQ_HOST_DEVICE inline float float16_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t exponent = (bits >> 10) & 0x1Fu;
  const uint32_t mantissa = bits & 0x3FFu;
  if (exponent == 0x1Fu) {
    return float_from_bits(sign | 0x7F800000u | (mantissa << 13) | (mantissa != 0u ? 0x400000u : 0u));
  }
  if (exponent != 0u) {
    return float_from_bits(sign | ((exponent + 112u) << 23) | (mantissa << 13));
  }
  const float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-08F;  // exact: 2^-24 each
  return float_from_bits(sign | float_bits(magnitude));
}

MARLIN_QQQ_HOST_DEVICE inline uint16_t float_to_output(float value, OutputType type) {
  return type == OutputType::kFloat16 ? float_to_float16(value) : float_to_bfloat16(value);
}

MARLIN_QQQ_HOST_DEVICE inline float output_to_float(uint16_t bits, OutputType type) {
  return type == OutputType::kFloat16 ? float16_to_float(bits) : bfloat16_to_float(bits);
}

}  // namespace marlin_qqq::format
