// Which problems the format can express. Error texts belong to the callers; the numbers stand here.
#pragma once

#include <cstdint>

#include "format/host_device.h"

namespace marlin_qqq::format {

// Input features that share one group scale.
inline constexpr int64_t kGroupSize = 128;

// A packed tile: 16 input features x 64 output features are 128 consecutive int32 words.
inline constexpr int64_t kTileInFeatures = 16;
inline constexpr int64_t kTileOutFeatures = 64;
inline constexpr int64_t kWordsPerTile = 128;

// What sizes must be multiples of.
inline constexpr int64_t kOutFeaturesMultiple = kTileOutFeatures;
inline constexpr int64_t kInFeaturesMultiple = 128;
// Packing alone needs whole tiles only; whole groups when there are group scales.
inline constexpr int64_t kPackedInFeaturesMultiple = kTileInFeatures;

// int32 accumulation is exact while 127 * 128 * in_features < 2^31, for activations down to -127; docs/format.md says
// what holds with -128.
inline constexpr int64_t kInFeaturesLimit = 132104;  // exclusive
static_assert(127 * 128 * (kInFeaturesLimit - 1) < (int64_t{1} << 31), "the largest sum must fit int32");

// Codes are signed 4-bit integers.
inline constexpr int kMinCode = -8;
inline constexpr int kMaxCode = 7;

// Workspace that callers of the op allocate: int32 values, zero before and after.
MARLIN_QQQ_HOST_DEVICE constexpr int64_t workspace_size(int64_t out_features) {
  return out_features / kTileOutFeatures * 16;
}

MARLIN_QQQ_HOST_DEVICE constexpr bool is_valid_out_features(int64_t out_features) {
  return out_features >= 0 && out_features % kOutFeaturesMultiple == 0;
}

MARLIN_QQQ_HOST_DEVICE constexpr bool is_valid_in_features(int64_t in_features) {
  return in_features >= 0 && in_features < kInFeaturesLimit && in_features % kInFeaturesMultiple == 0;
}

}  // namespace marlin_qqq::format
