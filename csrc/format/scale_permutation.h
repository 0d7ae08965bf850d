// Stored column of a scale from its logical output feature, and back. Both keep a column within its block (64 output
// features for group scales, 32 for channel scales), so permuting commutes with slicing at multiples of 64.
#pragma once

#include <cstdint>

#include "format/host_device.h"

namespace marlin_qqq::format {

MARLIN_QQQ_HOST_DEVICE constexpr int64_t stored_group_scale_column(int64_t n) {
  return n - n % 64 + 8 * (n % 8) + (n % 64) / 8;
}

// An 8 x 8 transposition is its own inverse.
MARLIN_QQQ_HOST_DEVICE constexpr int64_t logical_group_scale_column(int64_t stored) {
  return stored_group_scale_column(stored);
}

// Kernels pass uint32_t, for which the divisions are shifts and masks.
template <class Integer>
MARLIN_QQQ_HOST_DEVICE constexpr Integer stored_channel_scale_column(Integer n) {
  const Integer j = n % 32;
  return n - j + 8 * ((j % 8) / 2) + 2 * (j / 8) + j % 2;
}

MARLIN_QQQ_HOST_DEVICE constexpr int64_t logical_channel_scale_column(int64_t stored) {
  const int64_t j = stored % 32;
  return stored - j + 8 * ((j % 8) / 2) + 2 * (j / 8) + j % 2;
}

}  // namespace marlin_qqq::format
