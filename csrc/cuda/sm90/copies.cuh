// Feeding the Hopper kernel: rings of shared-memory stages of 128 inputs, which TMA fills with activations,
// packed weights and group scales, and the order in which a block walks its tiles. See docs/kernel-sm90.md.
#pragma once

#include "cuda/common/barrier.cuh"
#include "cuda/common/dependent_launch.cuh"
#include "cuda/common/elect.cuh"
#include "cuda/common/tma.cuh"
#include "cuda/sm90/config.cuh"
#include "cuda/sm90/ring_position.h"

namespace marlin_qqq::cuda::sm90 {

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
  // Nobody else fills the rings of a block that shares its inputs out: there the second barrier of a stage tells when
  // weights that are waited for early have arrived, of whose activations nothing is known yet.
  __device__ __forceinline__ uint32_t early_weights(int stage) const { return empty(stage); }
};

// Of a ring, by this launch.
template <class C>
__device__ __forceinline__ int used_stages(const Parameters& p) {
  if constexpr (C::kUsesAllStages) return C::kStages;
  return p.used_stages;
}

template <class C>
__device__ __forceinline__ RingPosition<C::kStages> ring_begin(const Parameters& p) {
  return {0, 0, used_stages<C>(p)};
}

// Tensor maps and barriers, before the first copy: of the whole block by one of its threads, or, where rings are their
// readers' own, of a ring by the thread that fills it, which may start to before the block's threads have met. (More
// threads are slower: each one's fence costs more than all the initialisations.)
template <class C>
__device__ __forceinline__ void prepare_copies(const Parameters& p, uint32_t shared, const Ring<C>& ring,
                                               bool first_ring) {
  if (first_ring) {
    tma_prefetch_map(&p.weights);
    if constexpr (C::kGrouped) tma_prefetch_map(&p.group_scales);
    if constexpr (!C::kQuantizes) tma_prefetch_map(&p.activations);
  }
#pragma unroll
  for (int stage = 0; stage < C::kStages; ++stage) {
    barrier_init(ring.full(stage), 1);
    if constexpr (!C::kDepthSplit) barrier_init(ring.empty(stage), C::kReaderWarps * p.multicast);
    if constexpr (C::kDepthSplit && C::kStagesAhead > 0) barrier_init(ring.early_weights(stage), 1);
  }
  if (first_ring) {
#pragma unroll
    for (int i = 0; i < C::kTile.exchange_barriers(); ++i) barrier_init(shared + C::kExchangeBarrierOffset + 8 * i, 1);
  }
  barrier_init_fence();
}

// The part of the product that one block works on.
struct WorkTile {
  int token;        // first token
  int feature;      // first output feature of this block's tile
  int stage_begin;  // first and past-the-last stage of inputs
  int stage_end;
  int scratch_rank;  // which of the clusters that share the tile
  bool shared;       // with other blocks of the cluster, each of which has a part of the inputs
};

// Tile number `work`, of all its inputs (`whole`) or of this block's slice of them.
__device__ __forceinline__ WorkTile work_tile(const Parameters& p, int work, bool whole, int block_rank,
                                              int tile_tokens, int tile_features) {
  const auto [scratch_rank, token_tile, feature_group] = p.order.place(work);
  const int cluster_rank = block_rank / p.multicast;
  const int feature_tile = feature_group * p.multicast + block_rank - cluster_rank * p.multicast;
  const int slices = p.split * p.scratch_split;
  const int slice = scratch_rank * p.split + cluster_rank;
  // The last tile ends with the last token where there are enough: two tiles then give the same bits to the tokens that
  // both hold. Tokens beyond the last cost TMA more than tokens.
  const int token = min(token_tile * tile_tokens, max(p.num_tokens - tile_tokens, 0));
  const int feature = feature_tile * tile_features;
  if (whole || slices == 1) return {token, feature, 0, p.stage_count, scratch_rank, false};
  return {token,        feature,    p.stage_count * slice / slices, p.stage_count * (slice + 1) / slices,
          scratch_rank, p.split > 1};
}

// Weights and group scales of a stage, whose bytes complete on `barrier`.
template <class C>
__device__ __forceinline__ void copy_weights(const Parameters& p, const Ring<C>& ring, int stage, const WorkTile& tile,
                                             int block, uint32_t barrier) {
  const uint64_t hint = p.order.token_tiles == 1 ? kEvictFirst : kEvictNormal;  // read once, or once a token tile
#pragma unroll
  for (int panel = 0; panel < C::kPanels; ++panel) {
    tma_load(&p.weights, ring.weights(stage) + panel * (C::kWeightBytes / C::kPanels), barrier,
             2 * (tile.feature + C::kPanelFeatures * panel), 8 * block, hint);
    if constexpr (C::kGrouped) {
      tma_load(&p.group_scales, ring.scales(stage) + panel * (C::kScaleBytes / C::kPanels), barrier,
               tile.feature + C::kPanelFeatures * panel, block, hint);
    }
  }
}

// The same for a stage whose activations follow: its barrier waits for both.
template <class C>
__device__ __forceinline__ void load_weights(const Parameters& p, const Ring<C>& ring, int stage, const WorkTile& tile,
                                             int block) {
  barrier_arrive_expect(ring.full(stage), p.activation_bytes + C::kWeightBytes + C::kScaleBytes);
  copy_weights<C>(p, ring, stage, tile, block, ring.full(stage));
}

// How a block shares the loading of activations with its neighbours in the cluster.
struct Multicast {
  int blocks;     // that share
  int rank;       // of this block among them
  int rows;       // tokens that each loads for all (Parameters::activation_rows)
  uint16_t mask;  // of the blocks' ranks in the cluster
};

template <class C>
__device__ __forceinline__ void load_activations(const Parameters& p, const Ring<C>& ring, int stage,
                                                 const WorkTile& tile, int block, const Multicast& multicast) {
  if constexpr (C::kQuantizes) return;
  if (C::kDepthSplit || multicast.blocks == 1) {
    tma_load(&p.activations, ring.activations(stage), ring.full(stage), 128 * block, tile.token, kEvictNormal);
    if constexpr (C::kTokens > plan::kLargestCopy) {
      tma_load(&p.activations, ring.activations(stage) + p.activation_rows * 128, ring.full(stage), 128 * block,
               tile.token + p.activation_rows, kEvictNormal);
    }
  } else {
    const int row = multicast.rank * multicast.rows;
    tma_load_multicast(&p.activations, ring.activations(stage) + row * 128, ring.full(stage), 128 * block,
                       tile.token + row, multicast.mask, kEvictNormal);
  }
}

// Weights of the stages begin..end-1 -> L2.
template <class C>
__device__ __forceinline__ void prefetch_weights(const Parameters& p, const WorkTile& tile, int begin, int end) {
#pragma unroll 1
  for (int block = begin; block < end; ++block) {
#pragma unroll
    for (int panel = 0; panel < C::kPanels; ++panel) {
      tma_prefetch(&p.weights, 2 * (tile.feature + C::kPanelFeatures * panel), 8 * block);
      if constexpr (C::kGrouped) tma_prefetch(&p.group_scales, tile.feature + C::kPanelFeatures * panel, block);
    }
  }
}

// The first fill of a ring, in one elected thread: a part before the kernel before this one has ended, the rest after.
// Weights that the caller promised to be constant do not depend on that kernel; everything else has to wait for it.
// Without the promise weights may at least be brought to L2 meanwhile: whoever writes them writes them there.
template <class C>
struct RingFill {
  const Parameters& p;
  const Ring<C>& ring;
  const WorkTile& tile;
  int stages;         // that are filled
  int fetched_early;  // of these, whose weights are fetched early
  int in_ring;        // of those, that go to the ring
  int awaited;        // of those, that are waited for early, too, to be dequantised

  __device__ __forceinline__ RingFill(const Parameters& p, const Ring<C>& ring, const WorkTile& tile)
      : p(p),
        ring(ring),
        tile(tile),
        stages(min(tile.stage_end - tile.stage_begin, used_stages<C>(p))),
        fetched_early(static_cast<int>(blockIdx.x) < p.early_blocks ? min(p.early_stages, stages) : 0),
        in_ring(p.early_into_ring ? fetched_early : 0),
        awaited(C::kStagesAhead > 0 && p.dequantizes_early ? in_ring : 0) {}

  // Of all the ring's inputs.
  __device__ __forceinline__ bool holds_all() const { return tile.stage_end - tile.stage_begin <= C::kStages; }

  // Not unrolled, here and below: with an unrolled loop of copies before the mainloop, ptxas takes the warp for
  // divergent from then on and keeps the mainloop's descriptors in registers of threads (7 % of the time of `narrow`
  // tiles).
  __device__ __forceinline__ void early() const {
#pragma unroll 1
    for (int i = 0; i < in_ring; ++i) {
      if (i >= awaited) {
        load_weights<C>(p, ring, i, tile, tile.stage_begin + i);
      } else if (i < p.early_in_flight) {
        load_awaited(i);
      }
    }
    if (!p.early_into_ring) prefetch_weights<C>(p, tile, tile.stage_begin, tile.stage_begin + fetched_early);
  }

  // When stage i, of those that are waited for early, has arrived.
  __device__ __forceinline__ void arrived(int i) const {
    if (i + p.early_in_flight < awaited) load_awaited(i + p.early_in_flight);
  }

  __device__ __forceinline__ void load_awaited(int i) const {
    barrier_arrive_expect(ring.early_weights(i), C::kWeightBytes + C::kScaleBytes);
    copy_weights<C>(p, ring, i, tile, tile.stage_begin + i, ring.early_weights(i));
  }

  __device__ __forceinline__ void rest(const Multicast& multicast) const {
#pragma unroll 1
    for (int i = 0; i < stages; ++i) {
      if (i < awaited) barrier_arrive_expect(ring.full(i), p.activation_bytes);
      if (i >= in_ring) load_weights<C>(p, ring, i, tile, tile.stage_begin + i);
      load_activations<C>(p, ring, i, tile, tile.stage_begin + i, multicast);
    }
  }
};

// The thread that fills the ring of a block whose warpgroups share it. `next_tile(WorkTile&)` gives this block's tiles
// in order, false after the last.
template <class C, class NextTile>
__device__ __forceinline__ void produce(const Parameters& p, const Ring<C>& ring, const Multicast& multicast,
                                        NextTile next_tile) {
  WorkTile tile;
  if (!next_tile(tile)) return;
  RingFill<C> fill(p, ring, tile);
  fill.early();
  wait_for_previous_kernel();
  fill.rest(multicast);
  auto position = ring_begin<C>(p);
  position.skip(fill.stages);
  int block = tile.stage_begin + fill.stages;
  do {
    for (; block < tile.stage_end; ++block) {
      barrier_wait(ring.empty(position.stage), position.phase ^ 1);
      load_weights<C>(p, ring, position.stage, tile, block);
      load_activations<C>(p, ring, position.stage, tile, block, multicast);
      position.advance();
    }
  } while (next_tile(tile) && (block = tile.stage_begin, true));
}

}  // namespace marlin_qqq::cuda::sm90
