// The Hopper mainloop: one thread feeds a ring of shared-memory stages through the copy engine; two warpgroups
// dequantise weights into registers, one group of products ahead of the tensor core. See docs/kernel-sm90.md.
#pragma once

#include "cuda/common/barrier.cuh"
#include "cuda/common/cluster.cuh"
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

// Shared-memory addresses of one ring of stages.
template <class C>
struct Ring {
  uint32_t base;      // of its stages
  uint32_t barriers;  // full, then empty, one a stage

  static __device__ __forceinline__ Ring of(uint32_t shared, int ring) {
    return {shared + C::kRingOffset + ring * C::kRingBytes, shared + C::kBarrierOffset + ring * 16 * C::kStages};
  }
  __device__ __forceinline__ uint32_t activations(int stage) const { return base + stage * C::kActivationBytes; }
  __device__ __forceinline__ uint32_t weights(int stage) const {
    return base + C::kWeightOffset + stage * C::kWeightBytes;
  }
  __device__ __forceinline__ uint32_t scales(int stage) const {
    return base + C::kScaleOffset + stage * C::kScaleBytes;
  }
  __device__ __forceinline__ uint32_t full(int stage) const { return barriers + 8 * stage; }
  __device__ __forceinline__ uint32_t empty(int stage) const { return full(stage) + 8 * C::kStages; }
};

// The part of the product that one block works on.
struct WorkTile {
  int token;        // first token
  int feature;      // first output feature of this block's tile
  int stage_begin;  // first and past-the-last stage of inputs
  int stage_end;
  int scratch_rank;  // which of the clusters that share the tile
};

__device__ __forceinline__ WorkTile work_tile(const Parameters& p, int work, int block_rank, int tile_tokens,
                                              int tile_features) {
  const int per_slice = p.token_tiles * p.feature_groups;
  const int scratch_rank = work / per_slice;
  const int in_slice = work - scratch_rank * per_slice;
  const int per_group = p.token_group * p.feature_groups;
  const int group = in_slice / per_group;
  const int in_group = in_slice - group * per_group;
  const int group_tokens = min(p.token_group, p.token_tiles - group * p.token_group);
  const int feature_group = in_group / group_tokens;
  const int token_tile = group * p.token_group + in_group - feature_group * group_tokens;
  const int cluster_rank = block_rank / p.multicast;
  const int feature_tile = feature_group * p.multicast + block_rank - cluster_rank * p.multicast;
  const int slices = p.split * p.scratch_split;
  const int slice = scratch_rank * p.split + cluster_rank;
  return {token_tile * tile_tokens, feature_tile * tile_features, p.stage_count * slice / slices,
          p.stage_count * (slice + 1) / slices, scratch_rank};
}

// ---- Copies ---------------------------------------------------------------------------------------------------------

template <class C>
__device__ __forceinline__ void load_weights(const Parameters& p, const Ring<C>& ring, int stage, const WorkTile& tile,
                                             int block) {
  const uint32_t full = ring.full(stage);
  barrier_arrive_expect(full, C::kStageBytes);
#pragma unroll
  for (int panel = 0; panel < C::kPanels; ++panel) {
    tma_load(&p.weights, ring.weights(stage) + panel * (C::kWeightBytes / C::kPanels), full,
             2 * (tile.feature + 128 * panel), 8 * block, kEvictFirst);
    if constexpr (C::kGrouped) {
      tma_load(&p.group_scales, ring.scales(stage) + panel * (C::kScaleBytes / C::kPanels), full,
               tile.feature + 128 * panel, block, kEvictFirst);
    }
  }
}

// How a block shares the loading of activations with its neighbours in the cluster.
struct Multicast {
  int blocks;     // that share
  int rank;       // of this block among them
  int rows;       // tokens that each loads for all
  uint16_t mask;  // of the blocks' ranks in the cluster
};

template <class C>
__device__ __forceinline__ void load_activations(const Parameters& p, const Ring<C>& ring, int stage,
                                                 const WorkTile& tile, int block, const Multicast& multicast) {
  if (C::kDepthSplit || multicast.blocks == 1) {
    tma_load(&p.activations, ring.activations(stage), ring.full(stage), 128 * block, tile.token, kEvictLast);
  } else {
    const int row = multicast.rank * multicast.rows;
    tma_load_multicast(&p.activations, ring.activations(stage) + row * 128, ring.full(stage), 128 * block,
                       tile.token + row, multicast.mask, kEvictLast);
  }
}

// The first fill of a ring, in one thread. Weights do not depend on the kernel before this one when the caller has
// promised so; everything else has to wait for it. Returns the number of stages filled.
template <class C>
__device__ __forceinline__ int fill_ring(const Parameters& p, const Ring<C>& ring, const WorkTile& tile,
                                         const Multicast& multicast) {
  const int filled = min(tile.stage_end - tile.stage_begin, C::kStages);
  if (!p.constant_weights) wait_for_previous_kernel();
  for (int i = 0; i < filled; ++i) load_weights<C>(p, ring, i, tile, tile.stage_begin + i);
  if (p.constant_weights) wait_for_previous_kernel();
  for (int i = 0; i < filled; ++i) load_activations<C>(p, ring, i, tile, tile.stage_begin + i, multicast);
  return filled;
}

// The thread that fills the ring of a block whose warpgroups share it. `next_tile(WorkTile&)` gives this block's tiles
// in order, false after the last.
template <class C, class NextTile>
__device__ __forceinline__ void produce(const Parameters& p, const Ring<C>& ring, const Multicast& multicast,
                                        NextTile next_tile) {
  WorkTile tile;
  if (!next_tile(tile)) return;
  const int filled = fill_ring<C>(p, ring, tile, multicast);
  RingPosition<C> position = {filled % C::kStages, static_cast<uint32_t>(filled / C::kStages)};
  int block = tile.stage_begin + filled;
  do {
    for (; block < tile.stage_end; ++block) {
      barrier_wait(ring.empty(position.stage), position.phase ^ 1);
      load_weights<C>(p, ring, position.stage, tile, block);
      load_activations<C>(p, ring, position.stage, tile, block, multicast);
      position.advance();
    }
  } while (next_tile(tile) && (block = tile.stage_begin, true));
}

// ---- Consumers ------------------------------------------------------------------------------------------------------

// A thread's view of the weights of a stage. The chunks of 16 features that a thread takes are neighbouring words of
// the packed tile (docs/format.md), so one load of 4 * blocks bytes a packed row fetches the operands of all its
// products.
template <class C>
struct WeightReader {
  uint32_t weight_offset;  // of the thread's first word in a stage
  uint32_t scale_offset;   // of the thread's first pair of scales in a stage

  __device__ __forceinline__ WeightReader(int warpgroup, int warp, int lane) {
    const int feature =
        (C::kDepthSplit ? 0 : warpgroup * C::kWarpgroupFeatures) + chunk_feature<C::kBlocks>(warp, lane / 8);
    const int panel = feature / 128;
    const int tile_of_panel = feature % 128 / 64;
    const int chunk = feature % 64 / 16;
    weight_offset = panel * (C::kWeightBytes / C::kPanels) + tile_of_panel * 512 + 16 * lane + 4 * chunk;
    scale_offset = panel * (C::kScaleBytes / C::kPanels) + tile_of_panel * 128 + 16 * (lane / 4) + 4 * chunk;
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

// The group scales of a slice, as stored and ready for use.
template <class C>
struct PackedScales {
  uint32_t pairs[C::kBlocks];
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
__device__ __forceinline__ void fetch_packed_scales(PackedScales<C>& packed, uint32_t address) {
  if constexpr (C::kGrouped) WeightReader<C>::load(packed.pairs, address);
}

template <class C>
__device__ __forceinline__ void spread_scales(Scales<C>& scales, const PackedScales<C>& packed) {
  if constexpr (C::kGrouped) {
#pragma unroll
    for (int j = 0; j < C::kBlocks; ++j) scales.pairs[j] = dequant::spread_group_scales(packed.pairs[j]);
  }
}

template <class C>
__device__ __forceinline__ void fetch_scales(Scales<C>& scales, uint32_t address) {
  PackedScales<C> packed;
  fetch_packed_scales<C>(packed, address);
  spread_scales<C>(scales, packed);
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

// Where this thread tells the producers that a stage has been read: thread `lane` of a warp tells block `lane` of those
// that write into the stage.
struct StageRelease {
  uint32_t first_empty_barrier;  // in the cluster's window
  bool tells;

  __device__ __forceinline__ void operator()(int stage) const {
    if (tells) barrier_arrive_cluster(first_empty_barrier + 8 * stage);
  }
};

template <class C>
__device__ __forceinline__ StageRelease stage_release(const Ring<C>& ring, int lane, int multicast_blocks,
                                                      int multicast_first) {
  const bool tells = lane < multicast_blocks;
  return {cluster_address(ring.empty(0), multicast_first + (tells ? lane : 0)), tells};
}

// For a warpgroup that fills its own ring: one of its threads refills a stage as soon as it has been read. A product is
// done for all warps of the warpgroup at once, and a warp issues it only when its own packed words have arrived.
template <class C>
struct StageRefill {
  const Parameters& p;
  const Ring<C>& ring;
  const WorkTile& tile;
  int next_block;
  bool fills;

  __device__ __forceinline__ void operator()(int stage) {
    if (fills && next_block < tile.stage_end) {
      load_weights<C>(p, ring, stage, tile, next_block);
      load_activations<C>(p, ring, stage, tile, next_block, {1, 0, 0, 0});
    }
    ++next_block;
  }
};

// Sums of one tile. sums[j][4 * i + 2 * b + e]: feature chunk_feature(warp, lane / 8) + 16 * j + 8 * b + lane / 4 of
// the warpgroup, token 8 * i + 2 * (lane % 4) + e.
//
// Three things run at once: the tensor core multiplies group g, the dequantisation prepares g + 1, and shared memory
// delivers the packed words of g + 2.
// `stage_is_free(stage)` is called once for every stage that has been read.
template <class C, class StageIsFree>
__device__ __forceinline__ void consume(const Ring<C>& ring, RingPosition<C>& position, const WorkTile& tile,
                                        const WeightReader<C>& reader, StageIsFree& stage_is_free,
                                        int32_t (&sums)[C::kBlocks][C::kTokens / 2]) {
  constexpr int kGroups = 4 / C::kStepsPerGroup;  // groups of products a slice of 128 inputs; even
  static_assert(kGroups % 2 == 0, "the double buffers must return to their start with each stage");
  PackedGroup<C> packed[2];
  Operands<C> operands[2];
  Scales<C> scales;
  barrier_wait(ring.full(position.stage), position.phase);
  fetch_scales<C>(scales, ring.scales(position.stage) + reader.scale_offset);
  fetch_group<C>(packed[0], ring.weights(position.stage) + reader.weight_offset, 0);
  fetch_group<C>(packed[1], ring.weights(position.stage) + reader.weight_offset, 1);
  dequantize_group<C>(operands[0], packed[0], scales);

#pragma unroll
  for (int j = 0; j < C::kBlocks; ++j) keep_in_place(sums[j]);
  int32_t accumulate = 0;
  int previous_stage = -1;
  for (int block = tile.stage_begin; block < tile.stage_end; ++block) {
    const int stage = position.stage;
    const bool last = block + 1 == tile.stage_end;
    const uint64_t activations = swizzled_descriptor(ring.activations(stage));
    const uint32_t weights = ring.weights(stage) + reader.weight_offset;
    position.advance();
    const uint32_t next_weights = ring.weights(position.stage) + reader.weight_offset;
    PackedScales<C> next_scales;
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

      // The words of the group after the next, possibly of the next stage
      if (group + 2 < kGroups) {
        fetch_group<C>(packed[group % 2], weights, group + 2);
      } else if (!last) {
        if (group + 2 == kGroups) {
          barrier_wait(ring.full(position.stage), position.phase);
          fetch_packed_scales<C>(next_scales, ring.scales(position.stage) + reader.scale_offset);
        }
        fetch_group<C>(packed[group % 2], next_weights, group + 2 - kGroups);
      }
      // The next group's operands, once the group before this one has let go of their registers. Groups before this one
      // are done then: the stage before is free.
      wgmma_wait<1>();
      if (group + 1 < kGroups) {
        dequantize_group<C>(operands[(group + 1) % 2], packed[(group + 1) % 2], scales);
      } else if (!last) {
        spread_scales<C>(scales, next_scales);
        dequantize_group<C>(operands[0], packed[0], scales);
      }
      if (group == 0 && previous_stage >= 0) stage_is_free(previous_stage);
    }
    previous_stage = stage;
  }
  wgmma_wait<0>();
#pragma unroll
  for (int j = 0; j < C::kBlocks; ++j) keep_in_place(sums[j]);
  stage_is_free(previous_stage);
}

}  // namespace marlin_qqq::cuda::sm90
