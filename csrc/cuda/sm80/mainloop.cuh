// The mma.sync mainloop's pieces: a warp reads the operands of a step (32 inputs) from shared memory into registers,
// dequantises the weights of its features into A fragments and multiplies them with its tokens' activations. See
// docs/kernel-sm80.md.
#pragma once

#include "cuda/common/mma.cuh"
#include "cuda/common/shared_memory.cuh"
#include "cuda/dequant/dequant.h"
#include "cuda/sm80/copies.cuh"

namespace marlin_qqq::cuda::sm80 {

// sums[j][i][2 * b + e]: feature 16 * j + 8 * b + lane / 4 and token 8 * i + 2 * (lane % 4) + e of the warp's tile.
template <class C>
using Sums = int32_t[C::kChunks][C::kTokenBlocks][4];

// What a warp multiplies in one step: packed words of the step's two rows, and activations, two blocks of eight tokens
// side by side.
template <class C>
struct Operands {
  uint32_t words[2][C::kChunks];
  uint32_t tokens[(C::kTokenBlocks + 1) / 2][4];
};

// The group scales of a stage.
template <class C>
using Scales = dequant::GroupScales[C::kChunks];

// Where a lane finds its operands in a stage. Steps differ in bits of the activation's address that nothing else sets.
template <class C>
class Reader {
  uint32_t weights_;
  uint32_t scales_;
  uint32_t activations_;
  uint32_t piece_;

 public:
  __device__ __forceinline__ Reader(int warp_feature, int warp_token, int depth_warp, int lane) {
    // The warp's chunks of 16 features are neighbouring words of a packed tile (docs/format.md).
    const int chunk = warp_feature / 64 * 512 + warp_feature % 64 / 16 * 4;
    weights_ = C::kActivationBytes + chunk + 16 * lane + depth_warp * C::kSteps * C::kFeatures * 16;
    scales_ =
        C::kActivationBytes + C::kWeightBytes + warp_feature / 64 * 128 + warp_feature % 64 / 16 * 4 + 16 * (lane / 4);
    const int row = warp_token + (C::kTokenBlocks > 1 ? lane / 16 * 8 : 0) + lane % 8;
    activations_ = row * C::kDepth;
    piece_ = activation_offset<C>(row, 2 * depth_warp * C::kSteps + lane / 8 % 2) - activations_;
  }

  __device__ __forceinline__ void read(Operands<C>& operands, uint32_t stage, int step) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      shared_load_words(operands.words[half], stage + weights_ + (2 * step + half) * C::kFeatures * 8);
    }
    const uint32_t address = stage + activations_ + (piece_ ^ (step * 32));
#pragma unroll
    for (int i = 0; i < C::kTokenBlocks; i += 2) {
      if constexpr (C::kTokenBlocks == 1) {
        load_matrix_pair(operands.tokens[0][0], operands.tokens[0][1], address);
      } else {
        load_matrix(operands.tokens[i / 2], address + 8 * i * C::kDepth);
      }
    }
  }
  __device__ __forceinline__ void read_scales(uint32_t (&pairs)[C::kChunks], uint32_t stage) const {
    if constexpr (C::kGrouped) shared_load_words(pairs, stage + scales_);
  }
};

template <class C>
__device__ __forceinline__ void multiply(const Operands<C>& operands, const Scales<C>& scales, Sums<C>& sums) {
#pragma unroll
  for (int j = 0; j < C::kChunks; ++j) {
    uint32_t a[4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      dequant::Columns columns;
      if constexpr (C::kGrouped) {
        columns = dequant::dequantize_per_group(operands.words[half][j], scales[j]);
      } else {
        columns = dequant::dequantize_per_channel(operands.words[half][j]);
      }
      a[2 * half] = columns.column0;
      a[2 * half + 1] = columns.column8;
    }
#pragma unroll
    for (int i = 0; i < C::kTokenBlocks; ++i) {
      mma_int8(sums[j][i], a, operands.tokens[i / 2][i % 2 * 2], operands.tokens[i / 2][i % 2 * 2 + 1]);
    }
  }
}

}  // namespace marlin_qqq::cuda::sm80
