// The Hopper kernels' walk round a ring of stages.
#include "cuda/sm90/ring_position.h"

#include <gtest/gtest.h>

#include <utility>

namespace marlin_qqq::cuda::sm90 {
namespace {

template <int kStages>
void expect_skip_is_many_advances(int used) {
  RingPosition<kStages> walked{0, 0, used};
  for (int before = 0; before <= 2 * kStages; ++before) {
    RingPosition<kStages> advanced = walked;
    for (int count = 0; count <= 200; ++count) {
      RingPosition<kStages> skipped = walked;
      skipped.skip(count);
      ASSERT_EQ(skipped.stage, advanced.stage) << kStages << " stages, " << before << " + " << count;
      ASSERT_EQ(skipped.phase, advanced.phase) << kStages << " stages, " << before << " + " << count;
      advanced.advance();
    }
    walked.advance();
  }
}

TEST(RingPosition, SkippingIsAdvancingOften) {
  [&]<int... kStages>(std::integer_sequence<int, kStages...>) {
    (expect_skip_is_many_advances<kStages + 1>(kStages + 1), ...);
    (expect_skip_is_many_advances<kStages + 1>(kStages / 2 + 1), ...);
  }
  (std::make_integer_sequence<int, 12>());
}

TEST(RingPosition, TheParityIsThatOfTheRound) {
  RingPosition<7> position;
  for (uint32_t use = 0; use < 100; ++use) {
    EXPECT_EQ(position.stage, static_cast<int>(use % 7));
    EXPECT_EQ(position.phase, use / 7 % 2);
    position.advance();
  }
}

TEST(RingPosition, StagesThatAreNotUsedAreSkipped) {
  RingPosition<7> position{0, 0, 3};
  for (uint32_t use = 0; use < 100; ++use) {
    EXPECT_EQ(position.stage, static_cast<int>(use % 3));
    EXPECT_EQ(position.phase, use / 3 % 2);
    position.advance();
  }
}

}  // namespace
}  // namespace marlin_qqq::cuda::sm90
