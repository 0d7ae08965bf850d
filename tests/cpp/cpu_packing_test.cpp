// pack_weight, unpack_weight, scale permutations and code_range on the CPU.
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

#include "cpu/kernels.h"
#include "testkit/reference.h"
#include "testkit/sha256.h"

namespace marlin_qqq {
namespace {

std::vector<int8_t> random_codes(int64_t count, uint32_t seed) {
  std::mt19937 random(seed);
  std::uniform_int_distribution<int> code(-8, 7);
  std::vector<int8_t> codes(static_cast<size_t>(count));
  for (int8_t& q : codes) q = static_cast<int8_t>(code(random));
  return codes;
}

std::vector<int32_t> pack(const std::vector<int8_t>& codes, int64_t in_features, int64_t out_features, bool grouped,
                          int num_threads = 2) {
  std::vector<int32_t> packed(static_cast<size_t>(in_features / 16 * 2 * out_features), -1);
  cpu::pack_weight(codes.data(), in_features, out_features, grouped, packed.data(), num_threads);
  return packed;
}

TEST(CpuPacking, DigestsOfTheFormatDocument) {
  constexpr int64_t kIn = 128;
  constexpr int64_t kOut = 256;
  for (const bool grouped : {false, true}) {
    std::vector<int8_t> codes(kIn * kOut);
    for (int64_t k = 0; k < kIn; ++k) {
      for (int64_t n = 0; n < kOut; ++n) {
        const int nibble = static_cast<int>((7 * k + 3 * n) % 16);
        codes[static_cast<size_t>(k * kOut + n)] =
            static_cast<int8_t>(grouped || nibble >= 8 ? nibble - (grouped ? 8 : 16) : nibble);
      }
    }
    const std::vector<int32_t> packed = pack(codes, kIn, kOut, grouped);
    EXPECT_EQ(testkit::sha256(packed.data(), packed.size() * 4),
              grouped ? "a71aa3d2b7ec2ecc92597544a4107af414872f137c2cc5d68fde2c15198ea8c4"
                      : "3a55170e851bd5a15241714a8810485977b240bf0c16ce92cdd2d8dff0c1b93a");
  }
}

TEST(CpuPacking, EqualsTheFormulasAndUnpackingUndoesIt) {
  for (const bool grouped : {false, true}) {
    for (const int64_t in_features : {16, 48, 128, 256}) {
      for (const int64_t out_features : {64, 192, 320}) {
        for (const int num_threads : {1, 3}) {
          const std::vector<int8_t> codes = random_codes(in_features * out_features, 1);
          const std::vector<int32_t> packed = pack(codes, in_features, out_features, grouped, num_threads);
          ASSERT_EQ(packed, testkit::reference_pack(codes, in_features, out_features, grouped));
          std::vector<int8_t> back(codes.size(), 99);
          cpu::unpack_weight(packed.data(), in_features, out_features, grouped, back.data(), num_threads);
          ASSERT_EQ(back, codes);
        }
      }
    }
  }
}

TEST(CpuPacking, CommutesWithConcatenation) {
  constexpr int64_t kIn = 32;
  constexpr int64_t kLeft = 64;
  constexpr int64_t kRight = 128;
  const std::vector<int8_t> left = random_codes(kIn * kLeft, 2);
  const std::vector<int8_t> right = random_codes(kIn * kRight, 3);
  std::vector<int8_t> both;
  for (int64_t k = 0; k < kIn; ++k) {
    both.insert(both.end(), left.begin() + k * kLeft, left.begin() + (k + 1) * kLeft);
    both.insert(both.end(), right.begin() + k * kRight, right.begin() + (k + 1) * kRight);
  }
  for (const bool grouped : {false, true}) {
    const std::vector<int32_t> packed_left = pack(left, kIn, kLeft, grouped);
    const std::vector<int32_t> packed_right = pack(right, kIn, kRight, grouped);
    std::vector<int32_t> joined;
    for (int64_t row = 0; row < kIn / 16; ++row) {
      joined.insert(joined.end(), packed_left.begin() + row * 2 * kLeft, packed_left.begin() + (row + 1) * 2 * kLeft);
      joined.insert(joined.end(), packed_right.begin() + row * 2 * kRight,
                    packed_right.begin() + (row + 1) * 2 * kRight);
    }
    EXPECT_EQ(pack(both, kIn, kLeft + kRight, grouped), joined);
  }
}

TEST(CpuPacking, NothingToPack) {
  EXPECT_EQ(pack({}, 0, 64, true).size(), 0u);
  EXPECT_EQ(pack({}, 16, 0, true).size(), 0u);
}

TEST(CpuPacking, CodeRange) {
  std::vector<int8_t> codes = random_codes(3'000'000, 4);
  const auto expect_range = [&](int minimum, int maximum) {
    for (const int num_threads : {1, 4}) {
      const cpu::CodeRange range = cpu::code_range(codes.data(), static_cast<int64_t>(codes.size()), num_threads);
      EXPECT_EQ(range.minimum, minimum);
      EXPECT_EQ(range.maximum, maximum);
    }
  };
  expect_range(-8, 7);
  codes.back() = 8;
  codes[1234] = -128;
  expect_range(-128, 8);
  codes.clear();
  expect_range(0, 0);
}

template <typename T>
void expect_permutes() {
  constexpr int64_t kOut = 192;
  constexpr int64_t kRows = 3;
  std::vector<T> natural(kRows * kOut);
  for (size_t i = 0; i < natural.size(); ++i) natural[i] = static_cast<T>(i * 7 + 1);
  for (const cpu::ScaleKind kind : {cpu::ScaleKind::kGroup, cpu::ScaleKind::kChannel}) {
    std::vector<T> stored(natural.size());
    cpu::permute_scale(natural.data(), kind, kRows, kOut, sizeof(T), stored.data());
    EXPECT_EQ(stored, testkit::reference_permute(natural, kOut, kind == cpu::ScaleKind::kGroup));
    std::vector<T> back(natural.size());
    cpu::unpermute_scale(stored.data(), kind, kRows, kOut, sizeof(T), back.data());
    EXPECT_EQ(back, natural);
  }
}

TEST(CpuPacking, ScalePermutationsOfTwoAndFourByteElements) {
  expect_permutes<uint16_t>();
  expect_permutes<uint32_t>();
}

}  // namespace
}  // namespace marlin_qqq
