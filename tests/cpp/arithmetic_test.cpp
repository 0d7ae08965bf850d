// The rounding rule, fp16 and bf16 conversions, the epilogue's order and quantisation of one value.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>

#include "format/epilogue.h"
#include "format/float16.h"
#include "format/rounding.h"
#include "format/token_quantization.h"
#include "testkit/reference.h"

namespace marlin_qqq {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Every fp16 scale and every code, against rint in double.
TEST(GroupWeight, EveryScaleAndCode) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const double scale = testkit::float16_value(static_cast<uint16_t>(bits));
    for (int code = -8; code <= 7; ++code) {
      const int weight = format::group_weight(code, static_cast<float>(scale));
      if (!std::isfinite(scale)) {
        ASSERT_EQ(weight, 0) << "scale bits " << bits << ", code " << code;
        continue;
      }
      ASSERT_EQ(weight, testkit::reference_weight(code, scale)) << "scale bits " << bits << ", code " << code;
      if (std::fabs(code * scale) < format::kLargestGroupProduct) {
        ASSERT_EQ(weight, std::nearbyint(code * scale)) << "scale bits " << bits << ", code " << code;
      }
    }
  }
}

TEST(GroupWeight, TiesAndWrapping) {
  EXPECT_EQ(format::group_weight(1, 0.5F), 0);
  EXPECT_EQ(format::group_weight(3, 0.5F), 2);
  EXPECT_EQ(format::group_weight(-1, 2.5F), -2);
  EXPECT_EQ(format::group_weight(-8, 16.0F), -128);
  EXPECT_EQ(format::group_weight(7, -19.352F), 121);  // -135.46 + 256
}

TEST(ChannelWeight, SixteenTimesTheCode) {
  for (int code = -8; code <= 7; ++code) {
    EXPECT_EQ(format::channel_weight(code), 16 * code);
  }
}

TEST(Float16, EveryValueSurvivesTheRoundTrip) {
  for (uint32_t i = 0; i < 65536; ++i) {
    const auto bits = static_cast<uint16_t>(i);
    const float half = format::float16_to_float(bits);
    const float brain = format::bfloat16_to_float(bits);
    ASSERT_EQ(std::isnan(half), testkit::is_float16_nan(bits));
    ASSERT_EQ(std::isnan(brain), testkit::is_bfloat16_nan(bits));
    if (!std::isnan(half)) {
      ASSERT_EQ(half, testkit::float16_value(bits));
      ASSERT_EQ(format::float_to_float16(half), bits);
    }
    if (!std::isnan(brain)) {
      ASSERT_EQ(brain, testkit::bfloat16_value(bits));
      ASSERT_EQ(format::float_to_bfloat16(brain), bits);
    }
  }
}

void expect_rounds_like_reference(float value) {
  if (std::isnan(value)) {
    ASSERT_TRUE(testkit::is_float16_nan(format::float_to_float16(value)));
    ASSERT_TRUE(testkit::is_bfloat16_nan(format::float_to_bfloat16(value)));
    return;
  }
  ASSERT_EQ(format::float_to_float16(value), testkit::to_float16(value)) << value;
  ASSERT_EQ(format::float_to_bfloat16(value), testkit::to_bfloat16(value)) << value;
}

// Every representable value, every midpoint between two of them, and the fp32 numbers beside each midpoint.
TEST(Float16, MidpointsGoToEven) {
  for (uint32_t i = 0; i < 65535; ++i) {
    const auto bits = static_cast<uint16_t>(i);
    for (const float lower : {format::float16_to_float(bits), format::bfloat16_to_float(bits)}) {
      const bool half = lower == format::float16_to_float(bits);
      const auto next_bits = static_cast<uint16_t>(i + 1);
      const float upper = half ? format::float16_to_float(next_bits) : format::bfloat16_to_float(next_bits);
      if (!std::isfinite(lower) || !std::isfinite(upper)) {
        continue;
      }
      const float middle = static_cast<float>((static_cast<double>(lower) + upper) / 2);
      for (const float value : {lower, middle, std::nextafter(middle, kInfinity), std::nextafter(middle, -kInfinity)}) {
        expect_rounds_like_reference(value);
      }
    }
  }
}

TEST(Float16, RandomBitsAndEdges) {
  std::mt19937 random(1);
  for (int i = 0; i < 2'000'000; ++i) {
    expect_rounds_like_reference(format::float_from_bits(static_cast<uint32_t>(random())));
  }
  for (const float value : {0.0F, -0.0F, 65504.0F, 65519.99F, 65520.0F, 65536.0F, -65520.0F, kInfinity, -kInfinity,
                            std::ldexp(1.0F, -24), std::ldexp(1.0F, -25), std::nextafter(std::ldexp(1.0F, -25), 1.0F),
                            std::ldexp(1.0F, -149), std::numeric_limits<float>::max(), std::nanf("")}) {
    expect_rounds_like_reference(value);
  }
  EXPECT_EQ(format::float_to_float16(65520.0F), 0x7C00);
  EXPECT_EQ(format::float_to_float16(-0.0F), 0x8000);
}

TEST(Epilogue, ScalesByChannelFirstAndRoundsEachProduct) {
  // 16777217 is no fp32: the sum rounds before anything else.
  EXPECT_EQ(format::scaled_sum(16777217, 1.0F, 1.0F), 16777216.0F);
  // The products overflow in one order only.
  EXPECT_EQ(format::scaled_sum(2, std::numeric_limits<float>::max(), 0.25F), kInfinity);
  EXPECT_EQ(format::scaled_sum(2, 0.25F, std::numeric_limits<float>::max()), std::numeric_limits<float>::max() / 2);
  // 3 * (1 + 2^-23) rounds up; with a fused multiply-add the bias would meet the unrounded product.
  const float scale = 1.0F + std::ldexp(1.0F, -23);
  const float product = format::scaled_sum(3, scale, 1.0F);
  EXPECT_EQ(format::biased(product, -product), 0.0F);
}

TEST(TokenQuantization, SpecialRows) {
  EXPECT_EQ(format::token_scale(0.0F).scale, 0.0F);
  EXPECT_EQ(format::token_scale(0.0F).multiplier, 0.0F);
  const float too_small = std::ldexp(1.0F, -125);  // 127 / 2^-125 overflows
  EXPECT_EQ(format::token_scale(too_small).scale, 0.0F);
  const float small = std::ldexp(1.0F, -120);
  EXPECT_EQ(format::token_scale(small).scale, small / 127.0F);
  EXPECT_TRUE(std::isnan(format::token_scale(kInfinity).scale));
  EXPECT_TRUE(std::isnan(format::token_scale(std::nanf("")).scale));
  EXPECT_EQ(format::quantize_value(std::nanf(""), 0.0F), 0);
}

TEST(TokenQuantization, RoundsHalfToEvenAndSaturates) {
  EXPECT_EQ(format::quantize_value(0.5F, 1.0F), 0);
  EXPECT_EQ(format::quantize_value(1.5F, 1.0F), 2);
  EXPECT_EQ(format::quantize_value(-2.5F, 1.0F), -2);
  EXPECT_EQ(format::quantize_value(1000.0F, 1.0F), 127);
  EXPECT_EQ(format::quantize_value(-1000.0F, 1.0F), -128);
}

}  // namespace
}  // namespace marlin_qqq
