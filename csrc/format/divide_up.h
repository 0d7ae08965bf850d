// Quotients rounded up: how many tiles, blocks or threads cover an extent.
#pragma once

#include <cstdint>

namespace marlin_qqq {

// a / b, rounded up, for a >= 0 and b > 0.
constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace marlin_qqq
