// The mma.sync mainloop: all threads copy stages ahead with cp.async; each warp dequantises the weights of its features
// into A fragments and multiplies them with its tokens' activations. See docs/kernel-sm80.md.
#pragma once

#include "cuda/common/barrier.cuh"
#include "cuda/common/mma.cuh"
#include "cuda/dequant/dequant.h"
#include "cuda/sm80/config.cuh"

namespace marlin_qqq::cuda::sm80 {

// Byte offset of 16-byte piece `piece` of activation row `row` in a stage: pieces are permuted so that eight rows of
// one piece lie in eight different groups of banks.
template <class C>
__device__ __forceinline__ uint32_t activation_offset(int row, int piece) {
  if constexpr (C::kDepth == 128) return row * 128 + ((piece ^ (row % 8)) * 16);
  return row * 64 + ((piece ^ (row / 2 % 4)) * 16);
}

// Starts the copies of one stage: `block` counts stages of inputs.
template <class C>
__device__ __forceinline__ void load_stage(const Parameters& p, uint32_t stage, int token, int feature, int block) {
  constexpr int kPieces = C::kDepth / 16;  // of an activation row
#pragma unroll
  for (int i = threadIdx.x; i < C::kTokens * kPieces; i += C::kThreads) {
    const int row = i / kPieces;
    const int piece = i % kPieces;
    const bool inside = token + row < p.num_tokens;
    const int64_t offset =
        static_cast<int64_t>(inside ? token + row : 0) * p.in_features + block * C::kDepth + 16 * piece;
    copy_async(stage + activation_offset<C>(row, piece), p.activations + offset, inside);
  }
  // Packed rows of 2 words a feature; the tile's part of a row is contiguous.
  constexpr int kRowPieces = C::kFeatures / 2;
  const uint32_t weights = stage + C::kActivationBytes;
#pragma unroll
  for (int i = threadIdx.x; i < C::kDepth / 16 * kRowPieces; i += C::kThreads) {
    const int row = i / kRowPieces;
    const int piece = i % kRowPieces;
    const bool inside = feature + 2 * piece < p.out_features;
    const int64_t offset = (static_cast<int64_t>(block) * (C::kDepth / 16) + row) * 2 * p.out_features +
                           2 * (inside ? feature + 2 * piece : 0);
    copy_async(weights + 16 * i, p.packed_weight + offset, inside);
  }
  if constexpr (C::kGrouped) {
    constexpr int kScalePieces = C::kFeatures / 8;
    for (int i = threadIdx.x; i < kScalePieces; i += C::kThreads) {
      const bool inside = feature + 8 * i < p.out_features;
      const int64_t offset =
          static_cast<int64_t>(block) * C::kDepth / 128 * p.out_features + (inside ? feature + 8 * i : 0);
      copy_async(weights + C::kWeightBytes + 16 * i, p.group_scale + offset, inside);
    }
  }
}

// kCount neighbouring words of shared memory.
template <int kCount>
__device__ __forceinline__ void load_words(uint32_t (&words)[kCount], uint32_t address) {
  if constexpr (kCount == 2) {
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "r"(address) : "memory");
  } else {
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
  }
}

// sums[j][i][2 * b + e]: feature 16 * j + 8 * b + lane / 4 and token 8 * i + 2 * (lane % 4) + e of the warp's tile.
template <class C>
using Sums = int32_t[C::kChunks][C::kTokenBlocks][4];

template <class C>
__device__ __forceinline__ void multiply_stage(uint32_t stage, int warp_feature, int warp_token, int warp_depth,
                                               int lane, Sums<C>& sums) {
  // The warp's chunks of 16 features are neighbouring words of a packed tile (docs/format.md).
  const uint32_t weights =
      stage + C::kActivationBytes + warp_feature / 64 * 512 + 16 * lane + warp_feature % 64 / 16 * 4;
  dequant::GroupScales scales[C::kChunks];
  if constexpr (C::kGrouped) {
    uint32_t pairs[C::kChunks];
    load_words(pairs, stage + C::kActivationBytes + C::kWeightBytes + warp_feature / 64 * 128 + 16 * (lane / 4) +
                          warp_feature % 64 / 16 * 4);
#pragma unroll
    for (int j = 0; j < C::kChunks; ++j) scales[j] = dequant::spread_group_scales(pairs[j]);
  }
#pragma unroll
  for (int s = 0; s < C::kSteps; ++s) {
    const int step = warp_depth * C::kSteps + s;
    uint32_t a[C::kChunks][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t words[C::kChunks];
      load_words(words, weights + (2 * step + half) * C::kFeatures * 8);
#pragma unroll
      for (int j = 0; j < C::kChunks; ++j) {
        dequant::Columns columns;
        if constexpr (C::kGrouped) {
          columns = dequant::dequantize_per_group(words[j], scales[j]);
        } else {
          columns = dequant::dequantize_per_channel(words[j]);
        }
        a[j][2 * half] = columns.column0;
        a[j][2 * half + 1] = columns.column8;
      }
    }
#pragma unroll
    for (int i = 0; i < C::kTokenBlocks; i += 2) {
      const int row = warp_token + 8 * i + lane / 16 * 8 + lane % 8;
      const int piece = 2 * step + lane / 8 % 2;
      uint32_t b[4];
      load_matrix(b, stage + activation_offset<C>(row, piece));
#pragma unroll
      for (int j = 0; j < C::kChunks; ++j) {
        mma_int8(sums[j][i], a[j], b[0], b[1]);
        mma_int8(sums[j][i + 1], a[j], b[2], b[3]);
      }
    }
  }
}

}  // namespace marlin_qqq::cuda::sm80
