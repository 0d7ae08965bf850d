// The order in which rings that flow from tile to tile take their stages.
#include "cuda/sm90/flow_position.h"

#include <gtest/gtest.h>

#include <map>
#include <utility>
#include <vector>

namespace marlin_qqq::cuda::sm90 {
namespace {

constexpr int kRings = 8;

struct Walk {
  std::map<std::pair<int, int>, int> taken;  // how often a tile's stage
  std::vector<std::vector<int>> tiles;       // of every ring, in order
};

Walk walk(const FlowTiles& all) {
  Walk result;
  for (int block = 0; block < all.blocks; ++block) {
    for (int ring = 0; ring < kRings; ++ring) {
      std::vector<int>& tiles = result.tiles.emplace_back();
      const int rank = all.clusters ? block % 2 : 0;
      for (FlowPosition<kRings> at(block, rank, ring); !at.at_end(all); at.advance(all)) {
        ++result.taken[{at.tile, at.stage}];
        EXPECT_EQ(at.shared(), at.tile >= all.whole_tiles);
        if (tiles.empty() || tiles.back() != at.tile) tiles.push_back(at.tile);
      }
    }
  }
  return result;
}

void expect_every_stage_once(const FlowTiles& all) {
  const Walk result = walk(all);
  EXPECT_EQ(result.taken.size(), static_cast<size_t>(all.tiles) * all.stages);
  for (const auto& [place, times] : result.taken) {
    ASSERT_TRUE(place.first >= 0 && place.first < all.tiles && place.second >= 0 && place.second < all.stages);
    ASSERT_EQ(times, 1) << "tile " << place.first << ", stage " << place.second;
  }
  // Its rings take a block's tiles in the same order, and none passes one over.
  for (size_t ring = 0; ring < result.tiles.size(); ++ring) {
    ASSERT_EQ(result.tiles[ring], result.tiles[ring - ring % kRings]) << "ring " << ring;
  }
}

TEST(FlowPosition, WholeTilesAreTakenOnceByBlocks) {
  for (const int stages : {8, 9, 15, 16, 28, 40}) {
    for (const int tiles : {4, 5, 11, 12}) expect_every_stage_once({stages, tiles, tiles, 4, false});
  }
}

TEST(FlowPosition, WhatIsLeftIsTakenOnceByClusters) {
  for (const int stages : {16, 17, 28, 40}) {
    for (const int rounds : {1, 3}) {
      // As many as there are clusters, or fewer: the others end with their whole tiles.
      for (const int left : {1, 2, 3}) expect_every_stage_once({stages, 6 * rounds, 6 * rounds + left, 6, true});
    }
  }
}

TEST(FlowPosition, TheRingsOfBothBlocksTakeTurnsAtTheSharedTile) {
  const FlowTiles all = {40, 2, 3, 2, true};
  const Walk result = walk(all);
  for (const std::vector<int>& tiles : result.tiles) EXPECT_EQ(tiles.back(), 2);
  FlowPosition<kRings> at(1, 1, 3);
  while (!at.shared()) at.advance(all);
  for (const int stage : {11, 27}) {
    EXPECT_EQ(at.stage, stage);
    at.advance(all);
  }
  EXPECT_TRUE(at.at_end(all));
}

}  // namespace
}  // namespace marlin_qqq::cuda::sm90
