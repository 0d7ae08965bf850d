// quantize_per_token on the CPU, every instruction set and input type, against arithmetic in the document's words.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "cpu/kernels.h"
#include "testkit/instruction_sets.h"
#include "testkit/reference.h"

namespace marlin_qqq {
namespace {

using cpu::InputType;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

class CpuQuantize : public testkit::WithInstructionSet {};
INSTANTIATE_TEST_SUITE_P(Every, CpuQuantize, testing::ValuesIn(testkit::supported_instruction_sets()),
                         testkit::instruction_set_of);

struct Row {
  std::vector<int> quantized;
  float scale;
};

Row reference_row(const std::vector<float>& values) {
  float amax = 0;
  bool finite = true;
  for (const float value : values) {
    finite = finite && std::isfinite(value);
    amax = std::max(amax, std::fabs(value));
  }
  const std::vector<int> zeros(values.size(), 0);
  if (!finite) return {zeros, kNan};
  const float multiplier = 127.0F / amax;
  if (amax == 0 || !std::isfinite(multiplier)) return {zeros, 0.0F};
  Row row{{}, amax / 127.0F};
  for (const float value : values) {
    const float product = value * multiplier;
    row.quantized.push_back(static_cast<int>(std::clamp(std::nearbyint(product), -128.0F, 127.0F)));
  }
  return row;
}

// `values` rounded to the type, as bytes of rows `stride` apart, and as fp32 again.
struct Input {
  Input(std::vector<std::vector<float>> values, InputType type, size_t stride) : rows(std::move(values)) {
    const size_t element = type == InputType::kFloat32 ? 4 : 2;
    bytes.assign(rows.size() * stride * element, 0x7F);  // the gaps would give other results if they were read
    for (size_t m = 0; m < rows.size(); ++m) {
      for (size_t k = 0; k < rows[m].size(); ++k) {
        float& value = rows[m][k];
        unsigned char* place = bytes.data() + (m * stride + k) * element;
        if (type == InputType::kFloat32) {
          std::memcpy(place, &value, 4);
        } else {
          const bool half = type == InputType::kFloat16;
          const uint16_t bits = half ? testkit::to_float16(value) : testkit::to_bfloat16(value);
          std::memcpy(place, &bits, 2);
          value = static_cast<float>(half ? testkit::float16_value(bits) : testkit::bfloat16_value(bits));
        }
      }
    }
  }
  std::vector<std::vector<float>> rows;
  std::vector<unsigned char> bytes;
};

void expect_exact(const std::vector<std::vector<float>>& values, InputType type, size_t gap, int num_threads) {
  const size_t in_features = values[0].size();
  const Input input(values, type, in_features + gap);
  constexpr int8_t kCanary = 99;
  std::vector<int8_t> quantized(values.size() * in_features + 1, kCanary);
  std::vector<float> scale(values.size(), -1.0F);
  cpu::quantize_per_token(input.bytes.data(), type, static_cast<int64_t>(values.size()),
                          static_cast<int64_t>(in_features), static_cast<int64_t>(in_features + gap), quantized.data(),
                          scale.data(), num_threads);
  EXPECT_EQ(quantized.back(), kCanary);
  for (size_t m = 0; m < values.size(); ++m) {
    const Row expected = reference_row(input.rows[m]);
    if (std::isnan(expected.scale)) {
      ASSERT_TRUE(std::isnan(scale[m])) << "row " << m;
    } else {
      ASSERT_EQ(scale[m], expected.scale) << "row " << m;
    }
    for (size_t k = 0; k < in_features; ++k) {
      ASSERT_EQ(quantized[m * in_features + k], expected.quantized[k]) << "row " << m << ", in_feature " << k;
    }
  }
}

constexpr InputType kTypes[] = {InputType::kFloat16, InputType::kBFloat16, InputType::kFloat32};

TEST_P(CpuQuantize, RandomRowsOfEverySize) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (const InputType type : kTypes) {
    for (const size_t in_features : {1, 2, 31, 32, 33, 64, 127, 128, 257, 1000}) {
      for (const float magnitude : {1.0F, 1e-6F, 1e4F}) {
        std::vector<std::vector<float>> rows(5, std::vector<float>(in_features));
        for (auto& row : rows) {
          for (float& value : row) value = magnitude * normal(random);
        }
        SCOPED_TRACE(testing::Message() << "type " << static_cast<int>(type) << ", in_features " << in_features);
        expect_exact(rows, type, in_features % 3, 1);
      }
    }
  }
}

// The special value at every place of the row: in whole vectors and in the rest.
TEST_P(CpuQuantize, NanOrInfinityAnywhereGivesZerosAndNan) {
  for (const InputType type : kTypes) {
    for (size_t place = 0; place < 75; ++place) {
      for (const float odd : {kNan, -kNan, kInfinity, -kInfinity}) {
        std::vector<float> row(75, 1.0F);
        row[place] = odd;
        expect_exact({row}, type, 0, 1);
      }
    }
  }
}

TEST_P(CpuQuantize, ZeroAndTinyRows) {
  const float smallest = std::numeric_limits<float>::denorm_min();
  const float limit = 127.0F / std::numeric_limits<float>::max();
  for (const InputType type : kTypes) {
    for (const float value :
         {0.0F, -0.0F, smallest, 1e-40F, limit / 2, limit, std::nextafter(limit, 1.0F), 4 * limit}) {
      expect_exact({std::vector<float>(70, value)}, type, 0, 1);
    }
  }
}

// Halves: with amax = 127 the multiplier is 1 and every x.5 is a tie.
TEST_P(CpuQuantize, TiesGoToEven) {
  std::vector<float> row = {127.0F};
  for (float value = -126.5F; value < 127.0F; value += 0.5F) {
    row.push_back(value);
  }
  for (const InputType type : kTypes) {
    expect_exact({row}, type, 0, 1);
  }
}

TEST_P(CpuQuantize, LargestNumbers) {
  const float largest = std::numeric_limits<float>::max();
  expect_exact({{largest, -largest, largest / 2, 1.0F}}, InputType::kFloat32, 0, 1);
  expect_exact({{65504.0F, -65504.0F, 1.0F}}, InputType::kFloat16, 0, 1);
}

TEST_P(CpuQuantize, ManyRowsManyThreads) {
  std::mt19937 random(2);
  std::normal_distribution<float> normal;
  std::vector<std::vector<float>> rows(700, std::vector<float>(300));
  for (auto& row : rows) {
    for (float& value : row) value = normal(random);
  }
  for (const int num_threads : {0, 1, 2, 7}) {
    expect_exact(rows, InputType::kFloat16, 4, num_threads);
  }
}

TEST_P(CpuQuantize, RowsWithoutElements) {
  std::vector<float> scale(3, -1.0F);
  cpu::quantize_per_token(nullptr, InputType::kFloat16, 3, 0, 0, nullptr, scale.data(), 2);
  EXPECT_EQ(scale, std::vector<float>(3, 0.0F));
}

}  // namespace
}  // namespace marlin_qqq
