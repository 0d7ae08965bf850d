// In which order the rings of a block that walks over tiles (plan::Cooperation::kFlow) take their stages.
#pragma once

#include "format/host_device.h"

namespace marlin_qqq::cuda::sm90 {

// What the blocks of a launch walk over: block b takes whole tiles b, b + blocks, ..., and of the tiles after those
// cluster c takes one, which its two blocks share.
struct FlowTiles {
  int stages;       // of a tile; at least one for every ring that takes turns at it
  int whole_tiles;  // that one block takes
  int tiles;        // all
  int blocks;
  bool clusters;  // of two blocks
};

// A place in the sequence of one ring's stages, which goes on from tile to tile: the kRings rings of a block take turns
// at the stages of its whole tiles, then those of both blocks at the one that they share, if there is one.
template <int kRings>
struct FlowPosition {
  int cluster;
  int ring;   // of the cluster's
  int turns;  // rings that take turns
  int tile;
  int stage;  // of the tile

  MARLIN_QQQ_HOST_DEVICE FlowPosition(int block, int block_rank, int block_ring)
      : cluster(block / 2), ring(block_rank * kRings + block_ring), turns(kRings), tile(block), stage(block_ring) {}

  MARLIN_QQQ_HOST_DEVICE void advance(const FlowTiles& all) {
    stage += turns;
    if (stage < all.stages) return;
    stage -= all.stages;
    tile += all.blocks;
    if (tile < all.whole_tiles) return;
    if (!all.clusters || shared()) {
      tile = all.tiles;
    } else {
      tile = all.whole_tiles + cluster;
      stage = ring;
      turns = 2 * kRings;
    }
  }
  MARLIN_QQQ_HOST_DEVICE bool shared() const { return turns > kRings; }
  MARLIN_QQQ_HOST_DEVICE bool at_end(const FlowTiles& all) const { return tile >= all.tiles; }
};

}  // namespace marlin_qqq::cuda::sm90
