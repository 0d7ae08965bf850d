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
  static constexpr int kScaleBytes = kTile.scale_bytes();
  static constexpr int kStageBytes = kTile.stage_bytes();
  static constexpr int kPassTokens = kTile.pass_tokens();
  static constexpr int kPartialPitch = kTile.partial_pitch();
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

  int num_tokens;
  int out_features;
  int in_features;
  int token_tiles;
  int feature_tiles;
  int split;           // blocks that share a tile's inputs
  uint32_t* counters;  // [tiles] zeros: arrivals of the tile's blocks (split > 1)
  int32_t* partials;   // [split][tiles][tokens][features] (split > 1)
};

}  // namespace marlin_qqq::cuda::sm80
