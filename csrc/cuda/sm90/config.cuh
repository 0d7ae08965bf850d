// The Hopper kernel's compile-time shape and its run-time parameters.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/sm90/tile_order.h"
#include "plan/sm90_tiles.h"

namespace marlin_qqq::cuda::sm90 {

// What a kernel does besides multiplying.
enum class Variant {
  kPlain,
  // Dequantises its first stages while it waits for the kernel before it. With group scales that takes all registers of
  // a multiprocessor: no block of another kernel, such as a quantisation, fits beside it.
  kAhead,
  // Gets its activations as fp16 or bf16 and quantises them itself.
  kQuantizing,
};

// Numbers of the block's named barriers (0 is __syncthreads); a warpgroup's own ones follow.
enum NamedBarrier {
  kStagingFree = 1,    // 1, 2: a warpgroup's output staging
  kPartialSums = 3,    // of the whole tile, in shared memory
  kChunksWritten = 4,  // 4 to 11: chunks of output in a warpgroup's staging
  kTurn = 12,          // 12, 13: whose turn it is (plan::Cooperation::kPingpong)
};

// A row of plan::kSm90Tiles, whether the weights have group scales, and the variant.
template <int kTileIndex, bool kWithGroupScales, Variant kVariant = Variant::kPlain>
struct Config {
  static constexpr plan::Sm90Tile kTile = plan::kSm90Tiles[kTileIndex];
  static constexpr bool kGrouped = kWithGroupScales;
  static constexpr bool kQuantizes = kVariant == Variant::kQuantizing;
  static constexpr bool kDepthSplit = kTile.depth_split();
  static constexpr bool kWarpRings = kTile.warp_rings();
  static constexpr bool kFlows = kTile.flows();
  static constexpr bool kPingpong = kTile.pingpong();

  static constexpr int kBlocks = kTile.blocks;  // products of 64 features a warpgroup
  static constexpr int kTokens = kTile.tokens;
  static constexpr int kFeatures = kTile.features();  // of the thread block
  static constexpr int kWarpgroupFeatures = kTile.warpgroup_features();
  static constexpr int kFeatureStride = kFeatures > kWarpgroupFeatures ? kWarpgroupFeatures : 0;  // between warpgroups
  static constexpr int kRings = kTile.rings();
  static constexpr int kStages = kTile.stages;
  static constexpr int kPanelFeatures = kTile.panel_features();  // weights travel in panels of this many features
  static constexpr int kPanels = kFeatures / kPanelFeatures;
  static constexpr int kConsumerThreads = 128 * kTile.warpgroups;
  static constexpr int kTileThreads = kPingpong ? 128 : kConsumerThreads;  // that multiply one tile
  static constexpr int kReaderWarps = kTileThreads / 32;                   // of a stage that a warp of its own fills
  static constexpr int kThreads = kTile.threads();
  static constexpr int kBlocksPerSm = kTile.blocks_per_sm;
  // Stages of a ring that are dequantised before the wait: to registers, and of a ring of a warp's own that holds all
  // its inputs, with group scales, the others to shared memory.
  static constexpr int kStagesAhead = kVariant != Variant::kPlain ? kTile.stages_ahead(kGrouped) : 0;
  static constexpr bool kSharedAhead = kGrouped && kWarpRings && kStagesAhead > 0;

  // Whether a launch uses all stages of its rings (else Parameters::used_stages says how many).
  static constexpr bool kUsesAllStages = kVariant != Variant::kPlain || kPingpong;

  static constexpr int kStoreTokens = kTile.store_tokens();  // rows of an output staging chunk
  static constexpr int kChunks = kTile.store_chunks();
  static constexpr int kStoreRows = kTile.store_rows();  // of one copy
  static constexpr int kChunkBytes = kTile.chunk_bytes();
  // Tokens of a chunk, by eights. The last chunk may have half of them.
  static constexpr int kOctets = kStoreTokens / 8;
  static __device__ __forceinline__ constexpr bool has_octet(int chunk, int octet) {
    return chunk * kStoreTokens + 8 * octet < kTokens;
  }
  static constexpr int kStoreBuffers = kTile.store_buffers();
  static constexpr int kPartialPitch = kTile.partial_pitch();
  static constexpr bool kSumsApart = kTile.sums_apart();
  // Sums and operands leave a thread so few registers that addresses kept through the products would spill.
  static constexpr bool kScarceRegisters = !kDepthSplit && !kPingpong && kBlocks * (kTokens / 2 + 16) >= 176;

  static constexpr int kActivationBytes = kTile.activation_bytes();
  static constexpr int kWeightBytes = kTile.weight_bytes();
  static constexpr int kScaleBytes = kGrouped ? kTile.scale_bytes() : 0;

  // Offsets in shared memory, from its first multiple of 1,024: output staging; the rings, each with the activations of
  // all its stages, then the weights, then the scales; token scales; barriers.
  static constexpr int kRingOffset = kTile.staging_bytes();
  static constexpr int kRingBytes = kTile.ring_bytes();
  static constexpr int kWeightOffset = kStages * kActivationBytes;  // within a ring
  static constexpr int kScaleOffset = kWeightOffset + kStages * kWeightBytes;
  static constexpr int kPartialOffset = kRingOffset;
  static constexpr int kReceivedOffset = kPartialOffset + kTile.partial_bytes();
  static constexpr int kTokenScaleOffset = kRingOffset + kTile.pipeline_bytes();
  static constexpr int kChannelScaleOffset = kTokenScaleOffset + kTile.token_scale_bytes();
  static constexpr int kBiasOffset = kChannelScaleOffset + 4 * kFeatures;
  static constexpr int kSumOffset = kChannelScaleOffset + kTile.feature_factor_bytes();
  static constexpr int kFlowReceivedOffset = kSumOffset + kTile.sums_apart_tiles() * kTile.sum_bytes();
  static constexpr int kBarrierOffset = kSumOffset + kTile.sums_apart_bytes();
  static constexpr int kExchangeBarrierOffset = kBarrierOffset + 16 * kStages * kRings;
  // Of a kernel that quantises: largest magnitudes, one a warp; the block's slice of the int8 activations,
  // [stages][num_tokens][128].
  static constexpr int kMagnitudeOffset = kExchangeBarrierOffset + 8 * kTile.exchange_barriers();
  static constexpr int kQuantizedOffset = (kMagnitudeOffset + kConsumerThreads / 32 * 4 + 127) / 128 * 128;
};

// Which chunk of 16 features of its packed tile (64 features) a thread's first product takes: the warp's own ones,
// rotated by the thread's octet of fragment rows (row / 2 of 8). The rotation only renames the product's rows; with it,
// the words that a warp loads at once (every fourth word, or every second pair) lie in all 32 banks of shared memory.
template <int kBlocks>
__device__ __forceinline__ constexpr int first_chunk(int warp, int octet) {
  return kBlocks == 1 ? (warp + octet) % 4 : kBlocks == 2 ? 2 * ((warp + octet) % 2) : 0;
}

// First feature, within the warpgroup's, of a thread's chunk: its features are this + 16 * j + 8 * b + row, for product
// j and fragment half b; `octet` is row / 2.
template <int kBlocks>
__device__ __forceinline__ constexpr int chunk_feature(int warp, int octet) {
  return 64 * (kBlocks * warp / 4) + 16 * first_chunk<kBlocks>(warp, octet);
}

struct Parameters {
  CUtensorMap activations;   // int8   [num_tokens, in_features],              box [activation_rows, 128], swizzled
  CUtensorMap weights;       // uint32 [in_features / 16, 2 * out_features],   box [8, 2 * panel_features]
  CUtensorMap group_scales;  // fp16   [in_features / 128, out_features],      box [1, panel_features]
  CUtensorMap output;        // 16 bit [num_tokens, out_features],             box [store_rows, 64], swizzled

  // Activations that the kernel quantises itself (Config::kQuantizes): fp16 or bf16, rows `x_row_stride` elements
  // apart.
  const void* x;
  int64_t x_row_stride;
  bool x_is_bfloat16;
  int token_warps_log2;      // warps that share the quantisation of a token
  float* found_token_scale;  // where the tokens' scales go for the reduction kernel; null: nowhere

  const float* token_scale;
  const float* channel_scale;
  const void* bias;
  void* output_pointer;
  bool output_is_bfloat16;
  // Blocks with a lower number than early_blocks fetch the weights of a ring's first early_stages stages before they
  // wait for the kernel before this one: to L2, or, if the weights are constant, into the ring. `flow` tiles: all
  // blocks.
  int early_blocks;
  int early_stages;
  bool early_into_ring;
  bool dequantizes_early;  // and waits for them, to dequantise them (Config::kStagesAhead) before the wait:
  int early_in_flight;     // then a ring has so many of them on their way at a time

  int used_stages;  // of a ring: what it has on its way at a time

  int activation_rows;   // tokens of a stage that a block loads, and bytes of those that the cluster's blocks load for
  int activation_bytes;  // each other: no more than the tokens there are
  int num_tokens;
  int out_features;
  int stage_count;  // in_features / 128: stages of a whole tile
  int works;        // tiles, or slices of tiles that clusters take
  int whole_works;  // the first of them, which blocks (or those that share activations) take by themselves, in rounds
  TileOrder order;
  int split;          // blocks of a cluster that share a tile's inputs
  int scratch_split;  // clusters that share a tile's inputs: their sums meet in `scratch`
  int32_t* scratch;   // [scratch_split][num_tokens][out_features] sums, for the reduction kernel (scratch_split > 1)
  int multicast;      // blocks of a cluster with neighbouring feature tiles, which share the activations
};

}  // namespace marlin_qqq::cuda::sm90
