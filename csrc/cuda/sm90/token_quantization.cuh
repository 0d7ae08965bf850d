// Quantisation of the activations by the product's own kernel, for few tokens. Every block finds the tokens' scales
// from whole rows, which all blocks read from L2, and keeps the int8 values of its own inputs in shared memory. That
// costs less than a kernel of its own with its two hand-overs, and the first weights arrive meanwhile.
#pragma once

#include "cuda/common/shared_memory.cuh"
#include "cuda/common/tma.cuh"
#include "cuda/quantize/row_quantization.cuh"
#include "cuda/sm90/copies.cuh"

namespace marlin_qqq::cuda::sm90 {

// Shared-memory addresses of the int8 values: a row of 128 bytes for each token there is, for every stage of the
// block's inputs. The 16-byte pieces of a row are swizzled: by token, or, for wgmma, by address, which is how the copy
// engine does it and wgmma undoes it. There a stage's rows may start anywhere, and those beyond the last token are the
// next stage's: nobody stores their products.
template <class C>
struct QuantizedTokens {
  uint32_t first;
  int tokens;

  __device__ __forceinline__ QuantizedTokens(const Parameters& p, uint32_t shared)
      : first(shared + C::kQuantizedOffset), tokens(p.num_tokens) {}

  // `stage` counts from the block's first.
  __device__ __forceinline__ uint32_t row(int stage, int token) const { return first + (stage * tokens + token) * 128; }
  // Of a row's 16 bytes.
  __device__ __forceinline__ uint32_t piece(int stage, int token, uint32_t index) const {
    const uint32_t address = row(stage, token);
    return address + 16 * (index ^ (C::kWarpRings ? token % 8 : address / 128 % 8));
  }
};

// A thread's share of one token: the warps of the block are dealt to the tokens, and their threads take vectors of 16
// bytes in turn. The whole share stays in registers: plan::Sm90Tile::can_quantize says how long a row may be.
template <class C, class T>
struct TokenRow {
  static constexpr int kVectors = C::kTile.quantized_vectors();
  static constexpr int kStageVectors = 128 / ElementVector<T>::kElements;  // of a token, a stage

  const Parameters& p;
  int warp;
  int lane;
  int token_warps;  // that share a token
  int token;
  int first;    // vector of this thread
  int stride;   // to its next one
  int vectors;  // of the row; none beyond the last token
  uint4 values[kVectors];

  __device__ __forceinline__ TokenRow(const Parameters& p, int warp, int lane)
      : p(p),
        warp(warp),
        lane(lane),
        token_warps(1 << p.token_warps_log2),
        token(warp >> p.token_warps_log2),
        first((warp & (token_warps - 1)) * 32 + lane),
        stride(32 * token_warps),
        vectors(token < p.num_tokens ? kStageVectors * p.stage_count : 0) {}

  // When the kernel before this one has ended.
  __device__ __forceinline__ void load() {
    const auto* row = reinterpret_cast<const uint4*>(static_cast<const T*>(p.x) + token * p.x_row_stride);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int index = first + i * stride;
      values[i] = make_uint4(0, 0, 0, 0);
      // From L2: another kernel's block on this multiprocessor may have brought what was there before to L1.
      if (index < vectors) values[i] = __ldcg(row + index);
    }
  }

  // Called by all threads of the block. `slice`: its inputs.
  __device__ __forceinline__ void quantize(uint32_t shared, const WorkTile& slice) const {
    uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) largest = max(largest, ElementVector<T>::largest(values[i]));
    const uint32_t magnitudes = shared + C::kMagnitudeOffset;
    largest = __reduce_max_sync(~0u, largest);
    if (lane == 0) shared_store(magnitudes + 4 * warp, largest);
    __syncthreads();
    const int token_warp = token * token_warps + (lane & (token_warps - 1));
    const RowScale scale(__reduce_max_sync(~0u, shared_load(magnitudes + 4 * token_warp)));

    const QuantizedTokens<C> quantized(p, shared);
    const int slice_begin = kStageVectors * slice.stage_begin;
    const int slice_end = min(vectors, kStageVectors * slice.stage_end);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (i * stride >= vectors) break;  // for all threads of the warp: instructions that need not even be fetched
      const int index = first + i * stride;
      if (index < slice_begin || index >= slice_end) continue;
      const int stage = index / kStageVectors - slice.stage_begin;
      shared_store(quantized.piece(stage, token, index % kStageVectors / 2) + 8 * (index % 2),
                   quantized_vector<T>(values[i], scale));
    }
    if (vectors > 0 && first == 0) {
      const float token_scale = scale.scale();
      shared_store(shared + C::kTokenScaleOffset + 4 * token, __float_as_uint(token_scale));
      // Every block finds the same scales; the tile that starts the features and the inputs hands them on.
      if (p.found_token_scale != nullptr && slice.feature == 0 && slice.stage_begin == 0) {
        p.found_token_scale[token] = token_scale;
      }
    }
    if constexpr (!C::kWarpRings) async_proxy_fence();  // wgmma reads what was written here
    __syncthreads();
  }
};

}  // namespace marlin_qqq::cuda::sm90
