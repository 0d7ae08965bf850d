// The kernels' division by invariants against the host's own.
#include "cuda/common/divisor.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <random>

namespace marlin_qqq::cuda {
namespace {

TEST(DivisorTest, EverySmallPair) {
  for (int d = 1; d <= 600; ++d) {
    const Divisor divisor = Divisor::of(d);
    EXPECT_EQ(divisor.divisor, static_cast<uint32_t>(d));
    for (int n = 0; n <= 5000; ++n) {
      const auto [quotient, remainder] = divisor.divide(n);
      ASSERT_EQ(quotient, n / d) << n << " / " << d;
      ASSERT_EQ(remainder, n % d) << n << " % " << d;
    }
  }
}

TEST(DivisorTest, EdgesOfTheRange) {
  constexpr int kLargest = std::numeric_limits<int>::max();
  for (int d : {1, 2, 3, 5, 7, 641, 65535, 65536, 65537, 1 << 30, (1 << 30) + 1, kLargest - 1, kLargest}) {
    const Divisor divisor = Divisor::of(d);
    for (int64_t multiple = 0; multiple <= kLargest; multiple += std::max<int64_t>(d, kLargest / 1000)) {
      for (int64_t n : {multiple - 1, multiple, multiple + 1}) {
        if (n < 0 || n > kLargest) continue;
        ASSERT_EQ(divisor.quotient(static_cast<int>(n)), n / d) << n << " / " << d;
      }
    }
    ASSERT_EQ(divisor.quotient(kLargest), kLargest / d) << d;
  }
}

TEST(DivisorTest, RandomPairs) {
  std::mt19937 generator(1);
  std::uniform_int_distribution<int> any(0, std::numeric_limits<int>::max());
  for (int i = 0; i < 200000; ++i) {
    const int n = any(generator);
    const int d = std::max(1, any(generator) >> (i % 31));
    ASSERT_EQ(Divisor::of(d).quotient(n), n / d) << n << " / " << d;
  }
}

}  // namespace
}  // namespace marlin_qqq::cuda
