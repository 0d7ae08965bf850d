// The order in which the clusters of a launch take its tiles.
#include "cuda/sm90/tile_order.h"

#include <gtest/gtest.h>

#include <array>
#include <set>
#include <utility>

namespace marlin_qqq::cuda::sm90 {
namespace {

using Tile = std::pair<int, int>;

TEST(TileOrder, EveryTileOfEverySliceIsTakenOnce) {
  for (const int token_tiles : {1, 2, 3, 7, 8, 9, 16, 17, 33}) {
    for (const int feature_groups : {1, 2, 5, 16, 17, 33, 64, 224}) {
      for (const int side_by_side : {1, 5, 15, 66, 132}) {
        const int tiles = token_tiles * feature_groups;
        for (int slice = 0; slice < 4; ++slice) {
          const bool features_first = slice < 2;
          const TileOrder order = TileOrder::of(token_tiles, feature_groups, side_by_side, features_first);
          std::set<Tile> taken;
          for (int work = slice * tiles; work < (slice + 1) * tiles; ++work) {
            const auto [of, token_tile, feature_group] = order.place(work);
            ASSERT_EQ(of, slice);
            ASSERT_TRUE(token_tile >= 0 && token_tile < token_tiles);
            ASSERT_TRUE(feature_group >= 0 && feature_group < feature_groups);
            taken.emplace(token_tile, feature_group);
          }
          ASSERT_EQ(taken.size(), static_cast<size_t>(tiles)) << token_tiles << " x " << feature_groups;
        }
      }
    }
  }
}

// What runs side by side needs few tiles of tokens and few of features; its neighbours share the one or the other.
TEST(TileOrder, WhatRunsSideBySideSharesItsOperands) {
  const auto operands = [](int token_tiles, int feature_groups, int side_by_side, int first,
                           bool features_first = true) {
    const TileOrder order = TileOrder::of(token_tiles, feature_groups, side_by_side, features_first);
    std::set<int> tokens, features;
    int neighbours = 0;
    for (int work = first; work < first + side_by_side; ++work) {
      const auto [slice, token_tile, feature_group] = order.place(work);
      tokens.insert(token_tile);
      features.insert(feature_group);
      neighbours += work > first && order.place(work - 1).token_tile == token_tile;
    }
    return std::array<int, 3>{static_cast<int>(tokens.size()), static_cast<int>(features.size()), neighbours};
  };
  EXPECT_EQ(operands(8, 16, 128, 0), (std::array<int, 3>{8, 16, 120}));  // all tiles are one patch
  EXPECT_EQ(operands(2, 64, 128, 0), (std::array<int, 3>{2, 64, 126}));
  EXPECT_EQ(operands(16, 224, 128, 0), (std::array<int, 3>{8, 16, 120}));  // a patch of many
  EXPECT_EQ(operands(16, 224, 128, 128), (std::array<int, 3>{8, 16, 120}));
  EXPECT_EQ(operands(16, 224, 128, 0, false), (std::array<int, 3>{8, 16, 0}));
  EXPECT_EQ(operands(3, 64, 132, 0, false), (std::array<int, 3>{3, 44, 0}));
  EXPECT_EQ(operands(16, 224, 66, 0), (std::array<int, 3>{8, 10, 57}));  // a patch of 8 x 8 and a part of the next
}

}  // namespace
}  // namespace marlin_qqq::cuda::sm90
