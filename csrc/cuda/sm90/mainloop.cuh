// The Hopper mainloop: warpgroups dequantise packed weights into registers, one group of products ahead of the tensor
// core. What feeds them is in copies.cuh; docs/kernel-sm90.md has the picture.
#pragma once

#include "cuda/common/barrier.cuh"
#include "cuda/common/cluster.cuh"
#include "cuda/common/wgmma.cuh"
#include "cuda/sm90/copies.cuh"
#include "cuda/sm90/operands.cuh"
#include "cuda/sm90/stages_ahead.cuh"

namespace marlin_qqq::cuda::sm90 {

// Where this thread tells the producers that a stage has been read: thread `lane` of a warp tells block `lane` of those
// that write into the stage; the others tell nobody (zeros).
struct StageRelease {
  uint32_t first_empty_barrier;  // in the cluster's window
  uint32_t barrier_bytes;

  __device__ __forceinline__ void operator()(int stage) const {
    const uint32_t barrier = first_empty_barrier + barrier_bytes * stage;
    if (barrier != 0) barrier_arrive_cluster(barrier);
  }
};

template <class C>
__device__ __forceinline__ StageRelease stage_release(const Ring<C>& ring, int lane, int multicast_blocks,
                                                      int multicast_first) {
  const bool tells = lane < multicast_blocks;
  const uint32_t barrier = cluster_address(ring.empty(0), multicast_first + (tells ? lane : 0));
  StageRelease release = {tells ? barrier : 0, tells ? 8u : 0u};
  asm volatile("" : "+r"(release.first_empty_barrier), "+r"(release.barrier_bytes));  // kept, not computed anew
  return release;
}

// For a warp or warpgroup that fills its own ring: one thread refills a stage as soon as it has been read. A product is
// done for all warps of the warpgroup at once, and a warp issues it only when its own packed words have arrived.
template <class C>
struct StageRefill {
  const Parameters& p;
  const Ring<C>& ring;
  const WorkTile& tile;
  int next_block;
  bool fills;  // this warp does

  __device__ __forceinline__ void operator()(int stage) {
    if (fills && next_block < tile.stage_end && elect_thread()) {
      load_weights<C>(p, ring, stage, tile, next_block);
      load_activations<C>(p, ring, stage, tile, next_block, {1, 0, 0, 0});
    }
    ++next_block;
  }
};

// Sums of one tile. sums[j][4 * i + 2 * b + e]: feature chunk_feature(warp, lane / 8) + 16 * j + 8 * b + lane / 4 of
// the warpgroup, token 8 * i + 2 * (lane % 4) + e.
//
// `token_rows(block, stage)` is where the int8 rows of the inputs' block `block` are.
//
// Three things run at once: the tensor core multiplies step s, the dequantisation prepares s + 1, and shared memory
// delivers the packed words of s + 2.
// `stage_is_free(stage)` is called once for every stage that has been read. `pass_turn()` is called when no more stages
// are left than the ring may hold beside the first one of the block's next tile, which the other warpgroup takes
// (Cooperation::kPingpong): if it began to wait earlier, its barrier's parity could be that of an earlier round.
template <class C, class TokenRows, class StageIsFree, class PassTurn>
__device__ __forceinline__ void consume(const Ring<C>& ring, RingPosition<C::kStages>& position, const WorkTile& tile,
                                        const WeightReader<C>& reader, const StagesAhead<C>& ahead,
                                        const TokenRows& token_rows, StageIsFree& stage_is_free,
                                        const PassTurn& pass_turn, int32_t (&sums)[C::kBlocks][C::kTokens / 2]) {
  static_assert(kSteps % 2 == 0, "the double buffers must return to their start with each stage");
  const auto keep_sums_in_place = [&] {
#pragma unroll
    for (int j = 0; j < C::kBlocks; ++j) keep_in_place(sums[j]);
  };
  keep_sums_in_place();
  int32_t accumulate = 0;
  const auto multiply = [&](const Operands<C>& operands, uint64_t activations) {
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < C::kBlocks; ++j) {
      wgmma_int8<C::kTokens>(sums[j], operands.a[j], activations, accumulate);
    }
    accumulate = 1;
    wgmma_commit();
  };
#pragma unroll
  for (int early = 0; early < C::kStagesAhead; ++early) {
    if (early >= ahead.count) break;
    barrier_wait(ring.full(early), 0);
    const uint64_t activations = swizzled_descriptor(ring.activations(early));
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      multiply(ahead.operands[early][step], activations + step * kDescriptorStep32);
    }
    wgmma_wait<0>();
    stage_is_free(early);
  }
  position.skip(ahead.count);
  const int stages = tile.stage_end - tile.stage_begin - ahead.count;
  if (C::kStagesAhead > 0 && stages <= 0) {
    keep_sums_in_place();
    return;
  }
  PackedStep<C> packed[2];
  Operands<C> operands[2];
  Scales<C> scales;
  barrier_wait(ring.full(position.stage), position.phase);
  PackedScales<C> packed_scales;
  fetch_packed_scales<C>(packed_scales, ring.scales(position.stage) + reader.scale_offset);
  fetch_step<C>(packed[0], ring.weights(position.stage) + reader.weight_offset, 0);
  fetch_step<C>(packed[1], ring.weights(position.stage) + reader.weight_offset, 1);
  prepare_scales<C>(scales, packed_scales);
  dequantize_step<C, true>(operands[0], packed[0], scales);
  int previous_stage = -1;
  const int last_stages = min(stages, C::kStages - 1);
  for (int left = stages; left > 0; --left) {
    const int stage = position.stage;
    const uint64_t activations = swizzled_descriptor(token_rows(tile.stage_end - left, stage));
    const uint32_t weights = ring.weights(stage) + reader.weight_offset;
    // After the last stage it is the last one's words that are read ahead, once more and for nothing: cheaper than a
    // branch at every place that reads ahead.
    if (left > 1) position.advance();
    if (C::kPingpong && left == last_stages) pass_turn();
    uint32_t next_weights = ring.weights(position.stage) + reader.weight_offset;
    uint32_t next_scales = ring.scales(position.stage) + reader.scale_offset;
    asm volatile("" : "+r"(next_weights), "+r"(next_scales));  // kept, not computed anew for every load
    bool next_is_full = false;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      multiply(operands[step % 2], activations + step * kDescriptorStep32);

      // The words of the step after the next, also of the next stage if that is there
      if (step + 2 < kSteps) {
        fetch_step<C>(packed[step % 2], weights, step + 2);
      } else {
        if (!C::kDepthSplit && step + 2 == kSteps && !next_is_full) {
          barrier_wait(ring.full(position.stage), position.phase);
        }
        if (!C::kDepthSplit || next_is_full) {
          if (step + 2 == kSteps) fetch_packed_scales<C>(packed_scales, next_scales);
          fetch_step<C>(packed[step % 2], next_weights, step + 2 - kSteps);
        } else if (step + 1 == kSteps) {
          // The stage that was read is filled again while the warpgroup waits for the next one.
          wgmma_wait<0>();
          stage_is_free(stage);
          barrier_wait(ring.full(position.stage), position.phase);
          fetch_packed_scales<C>(packed_scales, next_scales);
          fetch_step<C>(packed[0], next_weights, 0);
          fetch_step<C>(packed[1], next_weights, 1);
        }
      }
      // Asked a step before it matters: the answer takes a while.
      if (step + 3 == kSteps) next_is_full = barrier_completed(ring.full(position.stage), position.phase);
      // The next step's operands, once the step before this one has let go of their registers. Steps before this one
      // are done then: the stage before is free.
      wgmma_wait<1>();
      if (step + 1 == kSteps) prepare_scales<C>(scales, packed_scales);
      dequantize_step<C, true>(operands[(step + 1) % 2], packed[(step + 1) % 2], scales);
      if (step == 0 && previous_stage >= 0) stage_is_free(previous_stage);
    }
    previous_stage = !C::kDepthSplit || next_is_full ? stage : -1;  // else it has been told already
  }
  position.advance();
  wgmma_wait<0>();
  keep_sums_in_place();
  stage_is_free(previous_stage);
}

}  // namespace marlin_qqq::cuda::sm90
