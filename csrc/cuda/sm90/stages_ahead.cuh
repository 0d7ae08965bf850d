// What a block does while it waits for the kernel before (Variant::kAhead): docs/kernel-sm90.md, "Programmatic
// dependent launch".
#pragma once

#include "cuda/common/barrier.cuh"
#include "cuda/common/elect.cuh"
#include "cuda/common/shared_memory.cuh"
#include "cuda/sm90/copies.cuh"
#include "cuda/sm90/operands.cuh"

namespace marlin_qqq::cuda::sm90 {

// The first stages of a ring, dequantised while its reader waits for the kernel before: of a short product that is most
// of the work. A few to registers. With group scales the others to shared memory (Config::kSharedAhead), if the ring
// holds all of the warp's inputs: the operands of a stage take the place of two stages' weights.
template <class C>
struct StagesAhead {
  static_assert(!C::kSharedAhead || C::kStages - C::kStagesAhead <= C::kStages / 2, "see shared_operands");
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
    for (int j = 0; j < C::kBlocks; ++j) shared_load_words(operands.a[j], shared_operands(ring, stage, step, j));
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

}  // namespace marlin_qqq::cuda::sm90
