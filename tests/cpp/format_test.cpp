// Index maps: the format document's points and digests, and that every map is a bijection.
#include <gtest/gtest.h>

#include <set>
#include <string>
#include <vector>

#include "format/limits.h"
#include "format/packed_weight.h"
#include "format/scale_permutation.h"
#include "testkit/sha256.h"

namespace marlin_qqq {
namespace {

using format::packed_position;

TEST(Sha256, KnownDigests) {
  EXPECT_EQ(testkit::sha256("", 0), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(testkit::sha256("abc", 3), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  const std::string two_chunks(56, 'a');
  EXPECT_EQ(testkit::sha256(two_chunks.data(), 56), "b35439a4ac6f0948b6d6f9e3c6af0f5f590ce20f1bde7090ef7970686ec6738a");
}

struct Point {
  int64_t k, n, row, word;
  int channel_nibble, group_nibble;
};

TEST(PackedWeight, PointsOfTheFormatDocument) {
  const Point points[] = {{0, 0, 0, 0, 1, 0}, {1, 0, 0, 0, 3, 4},     {0, 1, 0, 16, 1, 0},
                          {0, 8, 0, 0, 0, 2}, {0, 16, 0, 1, 1, 0},    {0, 64, 0, 128, 1, 0},
                          {4, 0, 0, 4, 1, 0}, {15, 63, 0, 127, 6, 7}, {17, 75, 1, 176, 2, 6}};
  for (const Point& p : points) {
    SCOPED_TRACE(testing::Message() << "k " << p.k << ", n " << p.n);
    for (const bool grouped : {false, true}) {
      const format::PackedPosition position = packed_position(p.k, p.n, grouped);
      EXPECT_EQ(position.row, p.row);
      EXPECT_EQ(position.word, p.word);
      EXPECT_EQ(position.nibble, grouped ? p.group_nibble : p.channel_nibble);
    }
  }
}

TEST(PackedWeight, DigestsOfTheFormatDocument) {
  constexpr int64_t kIn = 128;
  constexpr int64_t kOut = 256;
  for (const bool grouped : {false, true}) {
    std::vector<uint32_t> words(kIn / 16 * 2 * kOut, 0);
    for (int64_t k = 0; k < kIn; ++k) {
      for (int64_t n = 0; n < kOut; ++n) {
        const format::PackedPosition p = packed_position(k, n, grouped);
        words[static_cast<size_t>(p.row * 2 * kOut + p.word)] |= static_cast<uint32_t>((7 * k + 3 * n) % 16)
                                                                 << (4 * p.nibble);
      }
    }
    EXPECT_EQ(testkit::sha256(words.data(), words.size() * 4),
              grouped ? "a71aa3d2b7ec2ecc92597544a4107af414872f137c2cc5d68fde2c15198ea8c4"
                      : "3a55170e851bd5a15241714a8810485977b240bf0c16ce92cdd2d8dff0c1b93a");
  }
}

TEST(PackedWeight, EveryNibbleHoldsOneWeightAndTheInverseFindsIt) {
  constexpr int64_t kIn = 48;
  constexpr int64_t kOut = 192;
  for (const bool grouped : {false, true}) {
    std::set<int64_t> nibbles;
    for (int64_t k = 0; k < kIn; ++k) {
      for (int64_t n = 0; n < kOut; ++n) {
        const format::PackedPosition p = packed_position(k, n, grouped);
        ASSERT_TRUE(p.row >= 0 && p.row < kIn / 16 && p.word >= 0 && p.word < 2 * kOut && p.nibble >= 0 &&
                    p.nibble < 8);
        ASSERT_TRUE(nibbles.insert((p.row * 2 * kOut + p.word) * 8 + p.nibble).second) << "k " << k << ", n " << n;
        const format::WeightPosition back = format::weight_position(p.row, p.word, p.nibble, grouped);
        ASSERT_EQ(back.in_feature, k);
        ASSERT_EQ(back.out_feature, n);
      }
    }
    EXPECT_EQ(static_cast<int64_t>(nibbles.size()), kIn * kOut);
  }
}

// Slices of packed tensors are slices of the weight: fused QKV and tensor-parallel shards rely on it.
TEST(PackedWeight, TilesDoNotDependOnTheirPlace) {
  for (const bool grouped : {false, true}) {
    for (int64_t k = 0; k < 16; ++k) {
      for (int64_t n = 0; n < 64; ++n) {
        const format::PackedPosition p = packed_position(k, n, grouped);
        const format::PackedPosition moved = packed_position(k + 16 * 5, n + 64 * 3, grouped);
        ASSERT_EQ(moved.row, p.row + 5);
        ASSERT_EQ(moved.word, p.word + 128 * 3);
        ASSERT_EQ(moved.nibble, p.nibble);
      }
    }
  }
}

TEST(Nibbles, RoundTripAndConvention) {
  for (int code = format::kMinCode; code <= format::kMaxCode; ++code) {
    for (const bool grouped : {false, true}) {
      EXPECT_EQ(format::decode_nibble(format::encode_nibble(code, grouped), grouped), code);
    }
    EXPECT_EQ(format::encode_nibble(code, true), static_cast<uint32_t>(code + 8));
    EXPECT_EQ(format::encode_nibble(code, false), static_cast<uint32_t>(code) & 15u);
  }
}

TEST(ScalePermutation, IsABijectionWithinItsBlockAndTheInverseUndoesIt) {
  std::set<int64_t> group_columns;
  std::set<int64_t> channel_columns;
  for (int64_t n = 0; n < 256; ++n) {
    const int64_t group = format::stored_group_scale_column(n);
    const int64_t channel = format::stored_channel_scale_column(n);
    EXPECT_EQ(group / 64, n / 64);
    EXPECT_EQ(channel / 32, n / 32);
    EXPECT_EQ(format::logical_group_scale_column(group), n);
    EXPECT_EQ(format::logical_channel_scale_column(channel), n);
    group_columns.insert(group);
    channel_columns.insert(channel);
  }
  EXPECT_EQ(group_columns.size(), 256u);
  EXPECT_EQ(channel_columns.size(), 256u);
}

TEST(ScalePermutation, PointsOfTheFormulas) {
  EXPECT_EQ(format::stored_group_scale_column(1), 8);
  EXPECT_EQ(format::stored_group_scale_column(8), 1);
  EXPECT_EQ(format::stored_group_scale_column(75), 64 + 8 * 3 + 1);
  EXPECT_EQ(format::stored_channel_scale_column(1), 1);
  EXPECT_EQ(format::stored_channel_scale_column(2), 8);
  EXPECT_EQ(format::stored_channel_scale_column(8), 2);
  EXPECT_EQ(format::stored_channel_scale_column(63), 32 + 8 * 3 + 2 * 3 + 1);
}

TEST(Limits, InFeaturesKeepSumsWithinInt32) {
  EXPECT_TRUE(format::is_valid_in_features(0));
  EXPECT_TRUE(format::is_valid_in_features(132096));
  EXPECT_FALSE(format::is_valid_in_features(132224));
  EXPECT_FALSE(format::is_valid_in_features(64));
  EXPECT_FALSE(format::is_valid_in_features(-128));
  EXPECT_TRUE(format::is_valid_out_features(64));
  EXPECT_FALSE(format::is_valid_out_features(32));
  EXPECT_EQ(format::workspace_size(4096), 1024);
}

}  // namespace
}  // namespace marlin_qqq
