// int4 -> int8 in registers. A packed word (docs/format.md) holds the weights of two output columns, n and n + 8, at
// four neighbouring inputs k; each function gives them as two registers of four int8, ready to be the A operand of
// mma.sync m16n8k32 or wgmma m64nNk32: `column0` is row lane / 4 of the fragment, `column8` is row lane / 4 + 8.
#pragma once

#include "cuda/dequant/word_arithmetic.h"

namespace marlin_qqq::dequant {

// The two int8 x 4 operand registers of one packed word.
struct Columns {
  uint32_t column0;
  uint32_t column8;
};

// Per-channel: 16 * q. The code is two's complement, so a nibble in the upper half of its byte is 16 * q as it stands:
// three instructions for eight weights.
MARLIN_QQQ_DEVICE_FUNCTION Columns dequantize_per_channel(uint32_t word) {
  return {word & 0xf0f0f0f0u, (word << 4) & 0xf0f0f0f0u};
}

// Per-group: round_half_even(q * scale) as int8. The arithmetic is fp16's smallest numbers, whose unit is 2^-24: a code
// without exponent bits is one of them as it stands, and they are whole multiples of that unit, so one fma rounds
// q * scale + 512 half to even. 512 is a multiple of 256: the low byte of the result is the product's two's complement.
// Right for products in [-128.25, 127.5); outside it wraps modulo 256 (as long as |product| <= 512).
//
// High nibbles keep their factor of 16, and meet a scale divided by 16. Where that is not exact, below 2^-10, every
// product rounds to zero anyway.

// The scales of columns n and n + 8: neighbours in the stored row, one in each half.
struct GroupScales {
  uint32_t scales;
  uint32_t sixteenths;
};

MARLIN_QQQ_DEVICE_FUNCTION GroupScales group_scales(uint32_t scales) {
  return {scales, half2_multiply(scales, 0x2c002c00u)};
}

namespace units {  // pairs of multiples of 2^-24
inline constexpr uint32_t k512 = 0x02000200u;
inline constexpr uint32_t kMinus8 = 0x80088008u;
inline constexpr uint32_t k128 = 0x00800080u;
inline constexpr uint32_t kMinus128 = 0x80808080u;
inline constexpr uint32_t kMinus136 = 0x80888088u;
}  // namespace units

MARLIN_QQQ_DEVICE_FUNCTION uint32_t round_codes(uint32_t codes01, uint32_t codes23, uint32_t scale,
                                                uint32_t sixteenth) {
  return pick_bytes(half2_fma(codes01, scale, units::k512), half2_fma(codes23, sixteenth, units::k512), 0x6420);
}

// Codes are offset binary, u = q + 8. Fourteen instructions for eight weights, in two ways: column n takes low and high
// nibbles by masks. The nibbles of column n + 8 are the high byte of each half, which one permutation moves into place
// as u_low + 16 u_high; the low one taken off, plus 128, leaves 16 q_high.
MARLIN_QQQ_DEVICE_FUNCTION Columns dequantize_per_group(uint32_t word, GroupScales pair) {
  const uint32_t low0 = half2_add(word & 0x000f000fu, units::kMinus8);
  const uint32_t high0 = half2_add(word & 0x00f000f0u, units::kMinus128);
  const uint32_t both = pick_bytes(word, 0, 0x4341);
  const uint32_t low8 = and_or(both, 0x000f000fu, units::k128);
  const uint32_t high8 = half2_subtract(both, low8);
  return {
      round_codes(low0, high0, low_halves(pair.scales), low_halves(pair.sixteenths)),
      round_codes(half2_add(low8, units::kMinus136), high8, high_halves(pair.scales), high_halves(pair.sixteenths))};
}

}  // namespace marlin_qqq::dequant
