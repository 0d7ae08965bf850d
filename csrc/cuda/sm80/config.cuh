// The mma.sync kernel's compile-time shape and its run-time parameters.
#pragma once

#include <cstdint>

#include "plan/sm80_tiles.h"

namespace marlin_qqq::cuda::sm80 {

// A row of plan::kSm80Tiles, and whether the weights have group scales.
template <int kTileIndex, bool kWithGroupScales>
struct Config {
  static constexpr plan::Sm80Tile kTile = plan::kSm80Tiles[kTileIndex];
  static constexpr bool kGrouped = kWithGroupScales;

  static constexpr int kWarpFeatures = kTile.warp_features;
  static constexpr int kWarpTokens = kTile.warp_tokens;
  static constexpr int kFeatureWarps = kTile.feature_warps;
  static constexpr int kTokenWarps = kTile.token_warps;
  static constexpr int kDepthWarps = kTile.depth_warps;
  static constexpr int kFeatures = kTile.features();
  static constexpr int kTokens = kTile.tokens();
  static constexpr int kDepth = kTile.depth;
  static constexpr int kStages = kTile.stages;
  static constexpr int kThreads = kTile.threads();
  static constexpr int kBlocksPerSm = kTile.blocks_per_sm;

  static constexpr int kChunks = kWarpFeatures / 16;        // A fragments of a warp
  static constexpr int kTokenBlocks = kWarpTokens / 8;      // B fragments of a warp
  static constexpr int kSteps = kDepth / 32 / kDepthWarps;  // of 32 inputs, a warp and stage

  static constexpr int kActivationBytes = kTile.activation_bytes();
  static constexpr int kWeightBytes = kTile.weight_bytes();
  static constexpr int kStageBytes = kTile.stage_bytes();
  static constexpr int kPassTokens = kTile.pass_tokens();
  static constexpr int kPartialPitch = kTile.partial_pitch();
  static constexpr int kTileSums = kTokens * kFeatures;
  static constexpr int kVectors = kFeatures / 4;        // of a token's sums, four features each
  static constexpr int kRowStep = kThreads / kVectors;  // tokens that the threads take at once, a vector each
  static_assert(kThreads % kVectors == 0);
};

// How the blocks divide the product. The first `whole` tiles are dealt out one by one. The rest is a row of units (a
// unit is one stage of inputs of one tile; a tile's units lie side by side) that is cut into equal lengths, one a
// block, which begin and end anywhere: such tiles are shared by several blocks.
struct Work {
  uint32_t units;  // of a tile
  uint32_t tiles;
  uint32_t token_tiles;  // neighbours in the order of tiles: blocks that run together share weights in L2
  uint32_t blocks;
  uint32_t whole;

  // Units of the shared tiles. units * tiles * (blocks + 1) is below 2^31 where tiles are shared.
  __host__ __device__ uint32_t shared_units() const { return units * (tiles - whole); }
  __host__ __device__ uint32_t first_unit(uint32_t block) const { return shared_units() * block / blocks; }
  __host__ __device__ uint32_t block_of(uint32_t unit) const { return ((unit + 1) * blocks - 1) / shared_units(); }
};

// A place in a block's work: its whole tiles, then its part of the shared ones.
struct Position {
  uint32_t tile;
  uint32_t unit;

  __device__ __forceinline__ void enter_shared(const Work& work) {
    const uint32_t first = work.first_unit(blockIdx.x);
    tile = work.whole + first / work.units;
    unit = first % work.units;
  }
  static __device__ __forceinline__ Position first(const Work& work) {
    Position position = {blockIdx.x, 0};
    if (position.tile >= work.whole) position.enter_shared(work);
    return position;
  }
  __device__ __forceinline__ void next_tile(const Work& work) {
    unit = 0;
    if (tile >= work.whole) {
      ++tile;
    } else {
      tile += work.blocks;
      if (tile >= work.whole) enter_shared(work);
    }
  }
};

struct Parameters {
  const int8_t* activations;
  const int32_t* packed_weight;
  const uint16_t* group_scale;
  const float* token_scale;
  const float* channel_scale;
  const void* bias;
  void* output;
  bool output_is_bfloat16;
  bool constant_weights;

  int num_tokens;
  int out_features;
  int in_features;
  Work work;
  int32_t* partials;  // [blocks][2][tokens][features] of shared tiles
};

}  // namespace marlin_qqq::cuda::sm80
