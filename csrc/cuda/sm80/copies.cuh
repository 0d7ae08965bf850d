// Feeding the mma.sync kernel: all threads copy stages of inputs (activations, packed weights, group scales) ahead with
// cp.async. What a thread copies of one stage lies at fixed distances from what it copied of the stage before.
#pragma once

#include "cuda/common/barrier.cuh"
#include "cuda/common/shared_memory.cuh"
#include "cuda/sm80/config.cuh"

namespace marlin_qqq::cuda::sm80 {

// Byte offset of 16-byte piece `piece` of activation row `row` in a stage: pieces are permuted so that eight rows of
// one piece lie in eight different groups of banks.
template <class C>
__device__ __forceinline__ uint32_t activation_offset(int row, int piece) {
  if constexpr (C::kDepth == 128) return row * 128 + ((piece ^ (row % 8)) * 16);
  return row * 64 + ((piece ^ (row / 2 % 4)) * 16);
}

// A block's place in its work, and the sources of this thread's copies there.
template <class C>
class Feeder {
  static constexpr int kPieces = C::kDepth / 16;  // of an activation row
  static constexpr int kPassRows = C::kThreads / kPieces;
  static constexpr int kActivationPasses = (C::kTokens + kPassRows - 1) / kPassRows;
  static constexpr int kRowPieces = C::kFeatures / 2;  // of a packed row: 2 words a feature
  static constexpr int kPassPackedRows = C::kThreads / kRowPieces;
  static constexpr int kWeightPasses = C::kDepth / 16 / kPassPackedRows;
  static_assert(C::kThreads % kRowPieces == 0 && C::kDepth / 16 % kPassPackedRows == 0);

  const Parameters& p_;
  Position position_;
  int left_;  // units of the tile that are still to be copied
  int rows_;  // tokens from this thread's first row on
  const int8_t* activations_;
  const int32_t* weights_;
  const uint16_t* scales_;
  uint32_t activation_target_;

  __device__ __forceinline__ void enter() {
    const int tile = position_.tile;
    const int unit = position_.unit;
    const int token_tile = tile % p_.work.token_tiles;
    const int feature_tile = tile / p_.work.token_tiles;
    const int row = token_tile * C::kTokens + threadIdx.x / kPieces;
    rows_ = threadIdx.x / kPieces < C::kTokens ? p_.num_tokens - row : 0;
    activations_ =
        p_.activations + static_cast<int64_t>(row) * p_.in_features + unit * C::kDepth + threadIdx.x % kPieces * 16;
    // Features past the end read those before it: nobody looks at their sums.
    const int feature = feature_tile * C::kFeatures;
    const int packed_row = unit * (C::kDepth / 16) + threadIdx.x / kRowPieces;
    const int column = min(feature + 2 * static_cast<int>(threadIdx.x % kRowPieces), p_.out_features - 2);
    weights_ = p_.packed_weight + 2 * (static_cast<int64_t>(packed_row) * p_.out_features + column);
    if constexpr (C::kGrouped) {
      const int scale_column = min(feature + 8 * static_cast<int>(threadIdx.x), p_.out_features - 8);
      scales_ = p_.group_scale + static_cast<int64_t>(unit) * C::kDepth / 128 * p_.out_features + scale_column;
    }
    left_ = p_.work.units - unit;
  }

 public:
  __device__ __forceinline__ Feeder(const Parameters& p, const Position& position) : p_(p), position_(position) {
    activation_target_ = activation_offset<C>(threadIdx.x / kPieces, threadIdx.x % kPieces);
    enter();
  }

  __device__ __forceinline__ void copy_activations(uint32_t stage) const {
#pragma unroll
    for (int pass = 0; pass < kActivationPasses; ++pass) {
      if (pass * kPassRows < rows_) {
        copy_async(stage + activation_target_ + pass * kPassRows * C::kDepth,
                   activations_ + static_cast<int64_t>(pass * kPassRows) * p_.in_features);
      }
    }
  }
  __device__ __forceinline__ void copy_weights(uint32_t stage) const {
    const uint32_t target = stage + C::kActivationBytes + 16 * threadIdx.x;
#pragma unroll
    for (int pass = 0; pass < kWeightPasses; ++pass) {
      copy_async(target + pass * C::kThreads * 16,
                 weights_ + static_cast<int64_t>(2 * pass * kPassPackedRows) * p_.out_features);
    }
    if constexpr (C::kGrouped) {
      if (threadIdx.x < C::kFeatures / 8) copy_async(target + C::kWeightBytes, scales_);
    }
  }
  // To the next unit of this block's work.
  __device__ __forceinline__ void advance() {
    if (--left_ == 0) {
      position_.next_tile(p_.work);
      enter();
      return;
    }
    activations_ += C::kDepth;
    weights_ += static_cast<int64_t>(C::kDepth / 8) * p_.out_features;
    if constexpr (C::kGrouped) {
      // A group is 128 inputs; a tile has a whole number of groups.
      if (C::kDepth == 128 || left_ % (128 / C::kDepth) == 0) scales_ += p_.out_features;
    }
  }
};

}  // namespace marlin_qqq::cuda::sm80
