// Division by a number that only the host knows: it prepares a multiplier, and the GPU divides in three instructions.
#pragma once

#include <cstdint>

#include "format/host_device.h"

namespace marlin_qqq::cuda {

// n / divisor for 0 <= n < 2^31 and 1 <= divisor < 2^31. Granlund and Montgomery, "Division by Invariant Integers using
// Multiplication", PLDI 1994, figure 4.1: with 2^(shift-1) < divisor <= 2^shift the quotient is
// (high word of n * multiplier + n) >> shift.
struct Divisor {
  uint32_t divisor;
  uint32_t multiplier;
  uint32_t shift;

  static Divisor of(int divisor) {
    uint32_t shift = 0;
    while ((uint64_t{1} << shift) < static_cast<uint64_t>(divisor)) ++shift;
    const uint64_t excess = (uint64_t{1} << shift) - static_cast<uint64_t>(divisor);
    return {static_cast<uint32_t>(divisor), static_cast<uint32_t>((excess << 32) / divisor + 1), shift};
  }

  MARLIN_QQQ_HOST_DEVICE int quotient(int n) const {
    const auto numerator = static_cast<uint32_t>(n);
#if defined(__CUDA_ARCH__)
    const uint32_t high = __umulhi(numerator, multiplier);
#else
    const auto high = static_cast<uint32_t>(uint64_t{numerator} * multiplier >> 32);
#endif
    return static_cast<int>((high + numerator) >> shift);
  }

  struct Division {
    int quotient;
    int remainder;
  };

  MARLIN_QQQ_HOST_DEVICE Division divide(int n) const {
    const int whole = quotient(n);
    return {whole, n - whole * static_cast<int>(divisor)};
  }
};

}  // namespace marlin_qqq::cuda
