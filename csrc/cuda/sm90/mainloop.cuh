// The Hopper mainloop: warpgroups dequantise packed weights into registers, one group of products ahead of the tensor
// core. What feeds them is in copies.cuh; docs/kernel-sm90.md has the picture.
#pragma once

#include "cuda/common/barrier.cuh"
#include "cuda/common/cluster.cuh"
#include "cuda/common/shared_memory.cuh"
#include "cuda/common/wgmma.cuh"
#include "cuda/dequant/dequant.h"
#include "cuda/sm90/copies.cuh"

namespace marlin_qqq::cuda::sm90 {

// A thread's view of the weights of a stage. The chunks of 16 features that a thread takes are neighbouring words of
// the packed tile (docs/format.md), so one load of 4 * blocks bytes a packed row fetches the operands of all its
// products.
template <class C>
struct WeightReader {
  uint32_t weight_offset;  // of the thread's first word in a stage
  uint32_t scale_offset;   // of the thread's first pair of scales in a stage

  __device__ __forceinline__ WeightReader(int warpgroup, int warp, int lane) {
    const int feature = warpgroup * C::kFeatureStride + chunk_feature<C::kBlocks>(warp, lane / 8);
    const int panel = feature / C::kPanelFeatures;
    const int tile_of_panel = feature % C::kPanelFeatures / 64;
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

// A stage's 128 inputs are multiplied in four steps of 32, the k of an int8 product.
inline constexpr int kSteps = 4;

// The packed words of one step: two packed rows.
template <class C>
struct PackedStep {
  uint32_t words[2][C::kBlocks];
};

// The A operands of one step.
template <class C>
struct Operands {
  uint32_t a[C::kBlocks][4];
};

// The group scales of a stage, as stored and ready for use.
template <class C>
struct PackedScales {
  uint32_t pairs[C::kBlocks];
};
template <class C>
struct Scales {
  dequant::GroupScales pairs[C::kGrouped ? C::kBlocks : 1];
};

template <class C>
__device__ __forceinline__ void fetch_step(PackedStep<C>& packed, uint32_t weights, int step) {
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    WeightReader<C>::load(packed.words[row], weights + (2 * step + row) * 8 * C::kPanelFeatures);
  }
}

template <class C>
__device__ __forceinline__ void fetch_packed_scales(PackedScales<C>& packed, uint32_t address) {
  if constexpr (C::kGrouped) WeightReader<C>::load(packed.pairs, address);
}

template <class C>
__device__ __forceinline__ void prepare_scales(Scales<C>& scales, const PackedScales<C>& packed) {
  if constexpr (C::kGrouped) {
#pragma unroll
    for (int j = 0; j < C::kBlocks; ++j) scales.pairs[j] = dequant::group_scales(packed.pairs[j]);
  }
}

// The two operand registers of the packed word `word` of product j.
template <class C>
__device__ __forceinline__ dequant::Columns dequantize_word(uint32_t word, const Scales<C>& scales, int j) {
  if constexpr (C::kGrouped) {
    return dequant::dequantize_per_group(word, scales.pairs[j]);
  } else {
    return dequant::dequantize_per_channel(word);
  }
}

// The A operands of a step. `kAsynchronous`: of products that run by themselves, so that all operands are computed
// here, ahead of their fence, and not sunk to the product that reads them. Otherwise in the order of the products.
template <class C, bool kAsynchronous>
__device__ __forceinline__ void dequantize_step(Operands<C>& operands, const PackedStep<C>& packed,
                                                const Scales<C>& scales) {
#pragma unroll
  for (int i = 0; i < 2 * C::kBlocks; ++i) {
    const int j = kAsynchronous ? i % C::kBlocks : i / 2;
    const int row = kAsynchronous ? i / C::kBlocks : i % 2;
    const dequant::Columns columns = dequantize_word<C>(packed.words[row][j], scales, j);
    operands.a[j][2 * row] = columns.column0;
    operands.a[j][2 * row + 1] = columns.column8;
    if constexpr (kAsynchronous) {
      asm volatile("" : "+r"(operands.a[j][2 * row]), "+r"(operands.a[j][2 * row + 1]));
    }
  }
}

// The first stages of a ring, dequantised while its reader waits for the kernel before: of a short product that is most
// of the work. A few to registers. With group scales the others to shared memory (Config::kSharedAhead), if the ring
// holds all of the warp's inputs: the operands of a stage take the place of two stages' weights.
template <class C>
struct StagesAhead {
  Operands<C> operands[C::kStagesAhead > 0 ? C::kStagesAhead : 1][kSteps];
  int count = 0;      // in registers,
  int in_shared = 0;  // then in shared memory
  int awaited = 0;    // stages whose weights' arrival has a barrier of its own

  // Before the wait, when RingFill::early has been called.
  __device__ __forceinline__ void dequantize(const Ring<C>& ring, const WeightReader<C>& reader,
                                             const RingFill<C>& fill, bool fills) {
    awaited = fill.awaited;
    count = min(awaited, C::kStagesAhead);
    const auto wait_for = [&](int stage) {
      barrier_wait(ring.early_weights(stage), 0);
      if (fills && elect_thread()) fill.arrived(stage);
      __syncwarp();
    };
#pragma unroll
    for (int stage = 0; stage < C::kStagesAhead; ++stage) {
      if (stage >= count) break;
      wait_for(stage);
      const Scales<C> scales = stage_scales(ring, reader, stage);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        PackedStep<C> packed;
        fetch_step<C>(packed, ring.weights(stage) + reader.weight_offset, step);
        dequantize_step<C, !C::kWarpRings>(operands[stage][step], packed, scales);
      }
    }
    if constexpr (C::kSharedAhead) {
      if (fill.holds_all()) in_shared = awaited - count;
#pragma unroll 1
      for (int stage = count; stage < count + in_shared; ++stage) {
        wait_for(stage);
        const Scales<C> scales = stage_scales(ring, reader, stage);
        PackedStep<C> packed[kSteps];
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          fetch_step<C>(packed[step], ring.weights(stage) + reader.weight_offset, step);
        }
        __syncwarp();  // all lanes have read the words, some of which are overwritten
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          Operands<C> dequantized;
          dequantize_step<C, false>(dequantized, packed[step], scales);
#pragma unroll
          for (int j = 0; j < C::kBlocks; ++j) {
            const uint32_t(&a)[4] = dequantized.a[j];
            shared_store(shared_operands(ring, stage, step, j), make_int4(a[0], a[1], a[2], a[3]));
          }
        }
      }
    }
#pragma unroll 1
    for (int stage = count + in_shared; stage < awaited - fill.p.early_in_flight; ++stage) wait_for(stage);
  }

  // A step's operands, by the threads that have stored them. `stage`: one of those in shared memory.
  __device__ __forceinline__ void load(Operands<C>& operands, const Ring<C>& ring, int stage, int step) const {
#pragma unroll
    for (int j = 0; j < C::kBlocks; ++j) {
      const int4 a = shared_load_int4(shared_operands(ring, stage, step, j));
      operands.a[j][0] = a.x;
      operands.a[j][1] = a.y;
      operands.a[j][2] = a.z;
      operands.a[j][3] = a.w;
    }
  }

 private:
  static __device__ __forceinline__ Scales<C> stage_scales(const Ring<C>& ring, const WeightReader<C>& reader,
                                                           int stage) {
    PackedScales<C> packed;
    Scales<C> scales;
    fetch_packed_scales<C>(packed, ring.scales(stage) + reader.scale_offset);
    prepare_scales<C>(scales, packed);
    return scales;
  }

  // Of one product: 16 bytes a thread. The stages' weights before this one and its own are no longer needed when it is
  // dequantised: operands 0 take the place of the words of stages 0 and 1, operands 1 that of stages 2 and 3.
  static __device__ __forceinline__ uint32_t shared_operands(const Ring<C>& ring, int stage, int step, int j) {
    return ring.weights(2 * (stage - C::kStagesAhead)) +
           16 * ((step * C::kBlocks + j) * 32 + static_cast<int>(threadIdx.x) % 32);
  }
};

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
