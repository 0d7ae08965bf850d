// The Hopper mainloop: one thread feeds a ring of shared-memory stages through the copy engine; two warpgroups
// dequantise weights into registers, one group of products ahead of the tensor core. See docs/kernel-sm90.md.
#pragma once

#include "cuda/common/barrier.cuh"
#include "cuda/common/dependent_launch.cuh"
#include "cuda/common/tma.cuh"
#include "cuda/common/wgmma.cuh"
#include "cuda/dequant/dequant.h"
#include "cuda/sm90/config.cuh"

namespace marlin_qqq::cuda::sm90 {

// A place in the ring of stages, and the parity of its barriers' current phase.
template <class C>
struct RingPosition {
  int stage = 0;
  uint32_t phase = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == C::kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// Shared-memory addresses of this block.
template <class C>
struct SharedMemory {
  uint32_t base;

  __device__ __forceinline__ uint32_t activations(int stage) const {
    return base + C::kActivationOffset + stage * C::kActivationBytes;
  }
  __device__ __forceinline__ uint32_t weights(int stage) const {
    return base + C::kWeightOffset + stage * C::kWeightBytes;
  }
  __device__ __forceinline__ uint32_t scales(int stage) const {
    return base + C::kScaleOffset + stage * C::kScaleBytes;
  }
  __device__ __forceinline__ uint32_t full(int stage) const { return base + C::kBarrierOffset + 8 * stage; }
  __device__ __forceinline__ uint32_t empty(int stage) const { return full(stage) + 8 * C::kStages; }
};

// The part of the product that one block works on.
struct WorkTile {
  int token;        // first token
  int feature;      // first output feature of this block's tile
  int stage_begin;  // first and past-the-last stage of inputs
  int stage_end;
};

__device__ __forceinline__ WorkTile work_tile(const Parameters& p, int work, int block_rank, int tile_tokens,
                                              int tile_features) {
  const int per_group = p.token_group * p.feature_groups;
  const int group = work / per_group;
  const int in_group = work - group * per_group;
  const int group_tokens = min(p.token_group, p.token_tiles - group * p.token_group);
  const int feature_group = in_group / group_tokens;
  const int token_tile = group * p.token_group + in_group - feature_group * group_tokens;
  const int split_rank = block_rank / p.multicast;
  const int feature_tile = feature_group * p.multicast + block_rank - split_rank * p.multicast;
  return {token_tile * tile_tokens, feature_tile * tile_features, p.stage_count * split_rank / p.split,
          p.stage_count * (split_rank + 1) / p.split};
}

// ---- Producer -------------------------------------------------------------------------------------------------------

template <class C>
__device__ __forceinline__ void load_weights(const Parameters& p, SharedMemory<C> shared, int stage,
                                             const WorkTile& tile, int block) {
  const uint32_t full = shared.full(stage);
  barrier_arrive_expect(full, C::kStageBytes);
#pragma unroll
  for (int panel = 0; panel < C::kPanels; ++panel) {
    tma_load(&p.weights, shared.weights(stage) + panel * (C::kWeightBytes / C::kPanels), full,
             2 * (tile.feature + 128 * panel), block * (C::kDepth / 16), kEvictFirst);
    if constexpr (C::kGrouped) {
      tma_load(&p.group_scales, shared.scales(stage) + panel * (C::kScaleBytes / C::kPanels), full,
               tile.feature + 128 * panel, block * C::kSlices, kEvictFirst);
    }
  }
}

template <class C>
__device__ __forceinline__ void load_activations(const Parameters& p, SharedMemory<C> shared, int stage,
                                                 const WorkTile& tile, int block, int multicast_rank,
                                                 uint16_t multicast_blocks) {
#pragma unroll
  for (int slice = 0; slice < C::kSlices; ++slice) {
    const uint32_t target = shared.activations(stage) + slice * C::kTokens * 128;
    const int column = block * C::kDepth + slice * 128;
    if (p.multicast == 1) {
      tma_load(&p.activations, target, shared.full(stage), column, tile.token, kEvictLast);
    } else {
      const int rows = C::kTokens / p.multicast;
      tma_load_multicast(&p.activations, target + multicast_rank * rows * 128, shared.full(stage), column,
                         tile.token + multicast_rank * rows, multicast_blocks, kEvictLast);
    }
  }
}

// Runs in one thread. `next_tile(WorkTile&)` gives this block's tiles in order, false after the last.
template <class C, class NextTile>
__device__ __forceinline__ void produce(const Parameters& p, SharedMemory<C> shared, int block_rank,
                                        NextTile next_tile) {
  const int multicast_rank = block_rank % p.multicast;
  const auto multicast_blocks =
      static_cast<uint16_t>(((1 << p.multicast) - 1) << (block_rank - multicast_rank));
  RingPosition<C> ring;
  WorkTile tile;
  if (!next_tile(tile)) return;

  // The first fill of the ring. Weights do not depend on the kernel before this one when the caller has promised so.
  const int filled = min(tile.stage_end - tile.stage_begin, C::kStages);
  if (!p.constant_weights) wait_for_previous_kernel();
  for (int i = 0; i < filled; ++i) load_weights<C>(p, shared, i, tile, tile.stage_begin + i);
  if (p.constant_weights) wait_for_previous_kernel();
  for (int i = 0; i < filled; ++i) {
    load_activations<C>(p, shared, ring.stage, tile, tile.stage_begin + i, multicast_rank, multicast_blocks);
    ring.advance();
  }

  int block = tile.stage_begin + filled;
  do {
    for (; block < tile.stage_end; ++block) {
      barrier_wait_cluster(shared.empty(ring.stage), ring.phase ^ 1);
      load_weights<C>(p, shared, ring.stage, tile, block);
      load_activations<C>(p, shared, ring.stage, tile, block, multicast_rank, multicast_blocks);
      ring.advance();
    }
  } while (next_tile(tile) && (block = tile.stage_begin, true));
}

// ---- Consumers ------------------------------------------------------------------------------------------------------

// A thread's view of the weights of a stage. Warp w of a warpgroup takes the 16 * blocks features from 16 * blocks * w on;
// their chunks of 16 are neighbouring words of the packed tile (docs/format.md), so one load of 4 * blocks bytes a
// packed row fetches the operands of all its products.
template <class C>
struct WeightReader {
  uint32_t weight_offset;  // of the thread's first word in a stage
  uint32_t scale_offset;   // of the thread's first pair of scales in a stage

  __device__ __forceinline__ WeightReader(int warpgroup, int warp, int lane) {
    const int feature = (C::kDepthSplit ? 0 : warpgroup * C::kWarpgroupFeatures) + 16 * C::kBlocks * warp;
    const int slice = C::kDepthSplit ? warpgroup : 0;
    const int panel = feature / 128;
    const int tile_of_panel = feature % 128 / 64;
    const int chunk = feature % 64 / 16;
    weight_offset = panel * (C::kWeightBytes / C::kPanels) + slice * 8 * 1024 + tile_of_panel * 512 + 16 * lane + 4 * chunk;
    scale_offset = panel * (C::kScaleBytes / C::kPanels) + slice * 256 + tile_of_panel * 128 + 16 * (lane / 4) + 4 * chunk;
  }

  // kBlocks neighbouring words.
  static __device__ __forceinline__ void load(uint32_t (&words)[C::kBlocks], uint32_t address) {
    if constexpr (C::kBlocks == 1) {
      asm volatile("ld.shared.b32 %0, [%1];" : "=r"(words[0]) : "r"(address) : "memory");
    } else if constexpr (C::kBlocks == 2) {
      asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "r"(address) : "memory");
    } else {
      asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                   : "r"(address)
                   : "memory");
    }
  }
};

// The packed words of one group of products: kStepsPerGroup steps of 32 inputs, two packed rows a step.
template <class C>
struct PackedGroup {
  uint32_t words[2 * C::kStepsPerGroup][C::kBlocks];
};

// The A operands of one group of products.
template <class C>
struct Operands {
  uint32_t a[C::kStepsPerGroup][C::kBlocks][4];
};

template <class C>
struct Scales {
  dequant::GroupScales pairs[C::kGrouped ? C::kBlocks : 1];
};

template <class C>
__device__ __forceinline__ void fetch_group(PackedGroup<C>& packed, uint32_t weights, int group) {
#pragma unroll
  for (int row = 0; row < 2 * C::kStepsPerGroup; ++row) {
    WeightReader<C>::load(packed.words[row], weights + (2 * C::kStepsPerGroup * group + row) * 1024);
  }
}

template <class C>
__device__ __forceinline__ void fetch_scales(Scales<C>& scales, uint32_t address) {
  if constexpr (C::kGrouped) {
    uint32_t words[C::kBlocks];
    WeightReader<C>::load(words, address);
#pragma unroll
    for (int j = 0; j < C::kBlocks; ++j) scales.pairs[j] = dequant::spread_group_scales(words[j]);
  }
}

template <class C>
__device__ __forceinline__ void dequantize_group(Operands<C>& operands, const PackedGroup<C>& packed,
                                                 const Scales<C>& scales) {
#pragma unroll
  for (int row = 0; row < 2 * C::kStepsPerGroup; ++row) {
#pragma unroll
    for (int j = 0; j < C::kBlocks; ++j) {
      dequant::Columns columns;
      if constexpr (C::kGrouped) {
        columns = dequant::dequantize_per_group(packed.words[row][j], scales.pairs[j]);
      } else {
        columns = dequant::dequantize_per_channel(packed.words[row][j]);
      }
      operands.a[row / 2][j][2 * (row % 2)] = columns.column0;
      operands.a[row / 2][j][2 * (row % 2) + 1] = columns.column8;
      // Computed here, ahead of the fence, and not sunk to the product that reads it.
      asm volatile("" : "+r"(operands.a[row / 2][j][2 * (row % 2)]), "+r"(operands.a[row / 2][j][2 * (row % 2) + 1]));
    }
  }
}

// Sums of one tile. sums[j][4 * i + 2 * b + e]: feature 16 * (blocks * warp + j) + 8 * b + lane / 4 of the warpgroup, token
// 8 * i + 2 * (lane % 4) + e.
template <class C>
__device__ __forceinline__ void consume(const Parameters& p, SharedMemory<C> shared, RingPosition<C>& ring,
                                        const WorkTile& tile, const WeightReader<C>& reader, int warpgroup, int lane,
                                        uint32_t multicast_first, int32_t (&sums)[C::kBlocks][C::kTokens / 2]) {
  constexpr int kGroups = 4 / C::kStepsPerGroup;  // groups of products a slice of 128 inputs; even
  static_assert(kGroups % 2 == 0, "the operands' double buffer must return to its start with each stage");
  const uint32_t slice_offset = C::kDepthSplit ? warpgroup * C::kTokens * 128 : 0;

  PackedGroup<C> packed;
  Scales<C> scales;
  Operands<C> operands[2];
  barrier_wait_cluster(shared.full(ring.stage), ring.phase);
  fetch_scales<C>(scales, shared.scales(ring.stage) + reader.scale_offset);
  fetch_group<C>(packed, shared.weights(ring.stage) + reader.weight_offset, 0);
  dequantize_group<C>(operands[0], packed, scales);

  // Releasing a stage tells every block whose producer writes into it.
  const auto release = [&](int stage) {
    if (p.multicast == 1) {
      if (lane == 0) barrier_arrive(shared.empty(stage));
    } else if (lane < p.multicast) {
      barrier_arrive_remote(shared.empty(stage), multicast_first + lane);
    }
  };

#pragma unroll
  for (int j = 0; j < C::kBlocks; ++j) keep_in_place(sums[j]);
  int32_t accumulate = 0;
  int previous_stage = -1;
  for (int block = tile.stage_begin; block < tile.stage_end; ++block) {
    const int stage = ring.stage;
    const bool last = block + 1 == tile.stage_end;
    const uint64_t activations = swizzled_descriptor(shared.activations(stage) + slice_offset);
    const uint32_t weights = shared.weights(stage) + reader.weight_offset;
    ring.advance();
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < C::kStepsPerGroup; ++step) {
#pragma unroll
        for (int j = 0; j < C::kBlocks; ++j) {
          WgmmaInt8<C::kTokens>::issue(sums[j], operands[group % 2].a[step][j],
                                       activations + (group * C::kStepsPerGroup + step) * kDescriptorStep32,
                                       accumulate);
        }
        accumulate = 1;
      }
      wgmma_commit();

      // While that runs: the next group's words, possibly of the next stage ...
      if (group + 1 < kGroups) {
        fetch_group<C>(packed, weights, group + 1);
      } else if (!last) {
        barrier_wait_cluster(shared.full(ring.stage), ring.phase);
        fetch_scales<C>(scales, shared.scales(ring.stage) + reader.scale_offset);
        fetch_group<C>(packed, shared.weights(ring.stage) + reader.weight_offset, 0);
      }
      // ... then, once the group before it has let go of its operand registers, the dequantisation into them.
      wgmma_wait<1>();
      if (group == 0 && previous_stage >= 0) release(previous_stage);
      if (group + 1 < kGroups || !last) dequantize_group<C>(operands[(group + 1) % 2], packed, scales);
    }
    previous_stage = stage;
  }
  wgmma_wait<0>();
#pragma unroll
  for (int j = 0; j < C::kBlocks; ++j) keep_in_place(sums[j]);
  release(previous_stage);
}

}  // namespace marlin_qqq::cuda::sm90
