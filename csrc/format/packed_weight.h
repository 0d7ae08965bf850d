// Where the code of weight (in_feature k, out_feature n) lies in the packed tensor, int32 [in_features / 16, 2 *
// out_features]. docs/format.md draws it.
#pragma once

#include <cstdint>

#include "format/host_device.h"
#include "format/limits.h"

namespace marlin_qqq::format {

// One nibble of the packed tensor.
struct PackedPosition {
  int64_t row;   // of the packed tensor: k / 16
  int64_t word;  // column of the packed tensor
  int nibble;    // bits [4 * nibble, 4 * nibble + 4) of the word
};

// One weight.
struct WeightPosition {
  int64_t in_feature;
  int64_t out_feature;
};

// Column of the packed tensor: both modes. Words of one tile are ordered as the lanes of a warp want them for
// mma.m16n8k32: lane 4 * (n % 8) + (k % 16) / 4 owns four consecutive words, one for every 16 output features.
MARLIN_QQQ_HOST_DEVICE constexpr int64_t packed_word(int64_t k, int64_t n) {
  return kWordsPerTile * (n / kTileOutFeatures) + 16 * (n % 8) + 4 * ((k % 16) / 4) + (n % 64) / 16;
}

// Nibble within the word. A word holds four consecutive k (r) of two columns n and n + 8 (b).
// Per channel: masking the high nibbles of the word leaves 16 * code of column b = 0, byte by byte.
// Per group: nibbles r and r + 1 of one column lie 16 bits apart, ready for a pair of fp16.
MARLIN_QQQ_HOST_DEVICE constexpr int packed_nibble(int64_t k, int64_t n, bool grouped) {
  const int r = static_cast<int>(k % 4);
  const int b = static_cast<int>((n % 16) / 8);
  return grouped ? 2 * b + r / 2 + 4 * (r % 2) : 2 * r + (1 - b);
}

MARLIN_QQQ_HOST_DEVICE constexpr PackedPosition packed_position(int64_t k, int64_t n, bool grouped) {
  return {k / kTileInFeatures, packed_word(k, n), packed_nibble(k, n, grouped)};
}

// The inverse of packed_position.
MARLIN_QQQ_HOST_DEVICE constexpr WeightPosition weight_position(int64_t row, int64_t word, int nibble, bool grouped) {
  const int64_t in_tile = word % kWordsPerTile;
  const int b = grouped ? (nibble / 2) % 2 : 1 - nibble % 2;
  const int r = grouped ? 2 * (nibble % 2) + nibble / 4 : nibble / 2;
  return {kTileInFeatures * row + 4 * ((in_tile / 4) % 4) + r,
          kTileOutFeatures * (word / kWordsPerTile) + 16 * (in_tile % 4) + 8 * b + in_tile / 16};
}

// Raw nibble of a code in [-8, 7]: two's complement per channel, offset binary per group.
MARLIN_QQQ_HOST_DEVICE constexpr uint32_t encode_nibble(int code, bool grouped) {
  return static_cast<uint32_t>(grouped ? code + 8 : code) & 0xFu;
}

MARLIN_QQQ_HOST_DEVICE constexpr int decode_nibble(uint32_t nibble, bool grouped) {
  return grouped ? static_cast<int>(nibble & 0xFu) - 8 : static_cast<int>((nibble & 0xFu) ^ 8u) - 8;
}

}  // namespace marlin_qqq::format
