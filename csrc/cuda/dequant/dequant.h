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

// The scales of columns n and n + 8 (neighbours in the stored row: the two halves of `pair`), each in both fp16 lanes.
struct GroupScales {
  uint32_t column0;
  uint32_t column8;
};

MARLIN_QQQ_DEVICE_FUNCTION GroupScales spread_group_scales(uint32_t pair) {
  return {pick_bytes(pair, 0, 0x1010), pick_bytes(pair, 0, 0x3232)};
}

// Two codes (offset binary, u = q + 8) -> fp16 q, exactly. A nibble OR-ed under the exponent of 1024 reads as 1024 + u
// (low nibbles) or 1024 + 16 u (high nibbles); the subtraction of 1032, or the division by 16 minus 72, leaves q.
MARLIN_QQQ_DEVICE_FUNCTION uint32_t low_codes(uint32_t word) {
  return half2_add(and_or(word, 0x000f000fu, 0x64006400u), 0xe408e408u);  // + (-1032)
}
MARLIN_QQQ_DEVICE_FUNCTION uint32_t high_codes(uint32_t word) {
  return half2_fma(and_or(word, 0x00f000f0u, 0x64006400u), 0x2c002c00u, 0xd480d480u);  // * 1/16 + (-72)
}

// Per-group: round_half_even(q * scale) as int8. fp16 numbers in [1024, 2048) are whole, so one fma with 1536 rounds
// the product half to even, and the low byte of the result is the product's two's complement (1536 is a multiple of
// 256). Right for products in [-128.25, 127.5); outside it wraps modulo 256 (as long as |product| <= 512).
MARLIN_QQQ_DEVICE_FUNCTION uint32_t round_codes(uint32_t codes01, uint32_t codes23, uint32_t scale) {
  const uint32_t rounded01 = half2_fma(codes01, scale, 0x66006600u);
  const uint32_t rounded23 = half2_fma(codes23, scale, 0x66006600u);
  return pick_bytes(rounded01, rounded23, 0x6420);
}

MARLIN_QQQ_DEVICE_FUNCTION Columns dequantize_per_group(uint32_t word, GroupScales scales) {
  const uint32_t upper = word >> 8;
  return {round_codes(low_codes(word), high_codes(word), scales.column0),
          round_codes(low_codes(upper), high_codes(upper), scales.column8)};
}

}  // namespace marlin_qqq::dequant
