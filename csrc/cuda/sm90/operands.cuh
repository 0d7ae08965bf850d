// From packed words in a stage of shared memory to the A operands of products, in registers.
#pragma once

#include "cuda/common/shared_memory.cuh"
#include "cuda/dequant/dequant.h"
#include "cuda/sm90/config.cuh"

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
    shared_load_words(packed.words[row], weights + (2 * step + row) * 8 * C::kPanelFeatures);
  }
}

template <class C>
__device__ __forceinline__ void fetch_packed_scales(PackedScales<C>& packed, uint32_t address) {
  if constexpr (C::kGrouped) shared_load_words(packed.pairs, address);
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

}  // namespace marlin_qqq::cuda::sm90
