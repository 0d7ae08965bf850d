// Which launches of a captured graph stand alone (csrc/cuda/launch_order.h).
#include "cuda/launch_order.h"

#include <gtest/gtest.h>

namespace marlin_qqq::cuda {
namespace {

const int kNodes[4] = {};

Capture capture(const void* last, unsigned long long id = 7) { return {true, id, last}; }

TEST(LaunchOrder, OutsideOfACaptureNothingIsKnown) {
  LaunchOrder order;
  EXPECT_FALSE(order.stands_alone({}));
  order.remember({}, true);
  EXPECT_FALSE(order.stands_alone({}));
  EXPECT_TRUE(order.stands_alone(capture(nullptr))) << "the first node of a graph";
}

TEST(LaunchOrder, ALaunchBehindOneOfOursDoesNot) {
  LaunchOrder order;
  order.remember(capture(&kNodes[0]), false);
  EXPECT_FALSE(order.stands_alone(capture(&kNodes[0])));
  EXPECT_TRUE(order.stands_alone(capture(&kNodes[1]))) << "another kernel came after it";
  EXPECT_TRUE(order.stands_alone(capture(nullptr))) << "several came before";
  EXPECT_TRUE(order.stands_alone(capture(&kNodes[0], 8))) << "another capture, whose nodes may be where those were";
}

TEST(LaunchOrder, AProductIsWhatItsQuantisationIs) {
  LaunchOrder order;
  order.remember(capture(&kNodes[0]), true);
  EXPECT_TRUE(order.stands_alone(capture(&kNodes[0])));
  order.remember(capture(&kNodes[1]), false);  // the product itself
  EXPECT_FALSE(order.stands_alone(capture(&kNodes[1])));
}

TEST(LaunchOrder, WhatIsLaunchedOutsideOfTheCaptureMeanwhileChangesNothing) {
  LaunchOrder order;
  order.remember(capture(&kNodes[2]), false);
  order.remember({}, true);
  EXPECT_FALSE(order.stands_alone(capture(&kNodes[2])));
}

// After a launch behind which several nodes are (none of them alone comes before the next one).
TEST(LaunchOrder, ALaunchWithoutANodeIsNobodysNeighbour) {
  LaunchOrder order;
  order.remember(capture(nullptr), false);
  EXPECT_TRUE(order.stands_alone(capture(nullptr)));
}

}  // namespace
}  // namespace marlin_qqq::cuda
