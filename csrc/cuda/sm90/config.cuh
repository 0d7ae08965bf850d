// The Hopper kernel's compile-time shape and its run-time parameters.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "plan/sm90_tiles.h"

namespace marlin_qqq::cuda::sm90 {

// A row of plan::kSm90Tiles, and whether the weights have group scales.
template <int kTileIndex, bool kWithGroupScales>
struct Config {
  static constexpr plan::Sm90Tile kTile = plan::kSm90Tiles[kTileIndex];
  static constexpr bool kGrouped = kWithGroupScales;
  static constexpr bool kDepthSplit = kTile.cooperation == plan::Cooperation::kDepth;

  static constexpr int kBlocks = kTile.blocks;  // products of 64 features a warpgroup
  static constexpr int kTokens = kTile.tokens;
  static constexpr int kFeatures = kTile.features();                   // of the thread block
  static constexpr int kWarpgroupFeatures = kTile.warpgroup_features();
  static constexpr int kSlices = kTile.slices();                       // of 128 inputs, a stage
  static constexpr int kDepth = kTile.depth();
  static constexpr int kStages = kTile.stages;
  static constexpr int kStepsPerGroup = kTile.steps_per_group();
  static constexpr int kPanels = kFeatures / 128;                      // weights travel in panels of 128 features
  static constexpr int kThreads = kTile.threads();
  static constexpr int kConsumerWarps = 8;
  static constexpr bool kWholeSm = kTile.whole_sm();
  static constexpr int kBlocksPerSm = kTile.blocks_per_sm;

  static constexpr int kStoreTokens = kTile.store_tokens();  // rows of an output staging chunk
  static constexpr int kChunkBytes = kTile.chunk_bytes();
  static constexpr int kPartialPitch = kTile.partial_pitch();

  static constexpr int kActivationBytes = kTile.activation_bytes();
  static constexpr int kWeightBytes = kTile.weight_bytes();
  static constexpr int kScaleBytes = kGrouped ? kTile.scale_bytes() : 0;
  static constexpr int kStageBytes = kActivationBytes + kWeightBytes + kScaleBytes;

  // Offsets in shared memory, from its first multiple of 1,024.
  static constexpr int kActivationOffset = kTile.staging_bytes();
  static constexpr int kWeightOffset = kActivationOffset + kStages * kActivationBytes;
  static constexpr int kScaleOffset = kWeightOffset + kStages * kWeightBytes;
  static constexpr int kPartialOffset = kActivationOffset;
  static constexpr int kTokenScaleOffset = kTile.staging_bytes() + kTile.pipeline_bytes();
  static constexpr int kBarrierOffset = kTokenScaleOffset + 2 * 4 * 256;
};

struct Parameters {
  CUtensorMap activations;   // int8   [num_tokens, in_features],              box [tokens / multicast, 128], swizzled
  CUtensorMap weights;       // uint32 [in_features / 16, 2 * out_features],   box [8 * slices, 256]
  CUtensorMap group_scales;  // fp16   [in_features / 128, out_features],      box [slices, 128]
  CUtensorMap output;        // 16 bit [num_tokens, out_features],             box [store_tokens, 64], swizzled

  const float* token_scale;
  const float* channel_scale;
  const void* bias;
  void* output_pointer;
  bool output_is_bfloat16;
  bool constant_weights;

  int num_tokens;
  int out_features;
  int stage_count;     // ceil(in_features / depth): stages of a whole tile
  int token_tiles;
  int feature_groups;  // feature tiles / multicast, rounded up
  int token_group;     // token tiles that are walked before the next feature group, so that weights meet in L2
  int split;           // blocks of a cluster that share a tile's inputs
  int multicast;       // blocks of a cluster with neighbouring feature tiles, which share the activations
};

}  // namespace marlin_qqq::cuda::sm90
