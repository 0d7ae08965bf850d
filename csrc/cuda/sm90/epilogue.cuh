// From exact int32 sums to output: whole tiles go from registers through shared memory to the copy engine; partial sums
// of split tiles meet in the shared memory of a cluster, so that no scratch, counter or lock exists.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/common/barrier.cuh"
#include "cuda/common/cluster.cuh"
#include "cuda/common/output.cuh"
#include "cuda/common/tma.cuh"
#include "cuda/sm90/config.cuh"
#include "cuda/sm90/copies.cuh"

namespace marlin_qqq::cuda::sm90 {

// Transposes an 8x8 block of 16-bit elements over the warp: lane l holds elements 2 * (l % 4) and the next of row l /
// 4, before and after. PTX ISA, movmatrix.
__device__ __forceinline__ uint32_t transposed(uint32_t block) {
  uint32_t result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(block));
  return result;
}

// Channel scales and biases of the features of a thread's sums, fetched before the products so that nothing waits for
// them after.
template <class C>
struct FeatureFactors {
  float channel_scale[C::kBlocks][2];
  float bias[C::kBlocks][2];

  __device__ __forceinline__ void load(const Parameters& p, int feature, int warp, int lane) {
#pragma unroll
    for (int j = 0; j < C::kBlocks; ++j) {
#pragma unroll
      for (int b = 0; b < 2; ++b) {
        const int column = feature + chunk_feature<C::kBlocks>(warp, lane / 8) + 16 * j + 8 * b + lane / 4;
        const bool inside = column < p.out_features;
        channel_scale[j][b] = inside ? __ldg(p.channel_scale + format::stored_channel_scale_column(column)) : 0.0f;
        bias[j][b] = inside && p.bias != nullptr ? load_bias(p.bias, column, p.output_is_bfloat16) : 0.0f;
      }
    }
  }
};

// A thread's part of the tile's token scales, on their way to shared memory: loaded before the products, stored after.
template <class C>
struct TokenScales {
  static constexpr int kCount = (C::kTokens + 127) / 128;
  float values[kCount];

  __device__ __forceinline__ void load(const Parameters& p, int token) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int index = threadIdx.x % 128 + 128 * i;
      values[i] = index < C::kTokens && token + index < p.num_tokens ? p.token_scale[token + index] : 0.0f;
    }
  }
  __device__ __forceinline__ void store(float* token_scales) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int index = threadIdx.x % 128 + 128 * i;
      if (index < C::kTokens) token_scales[index] = values[i];
    }
  }
};

// A whole tile: this warpgroup's features x tokens. Called by its 128 threads, which have stored its token scales.
template <class C, bool kHasBias>
__device__ __forceinline__ void store_tile(const Parameters& p, uint32_t staging, const float* token_scales,
                                           const FeatureFactors<C>& factors, int token, int feature, int warpgroup,
                                           int warp, int lane, const int32_t (&sums)[C::kBlocks][C::kTokens / 2]) {
  constexpr int kStoreTokens = C::kStoreTokens;
  constexpr int kChunkBytes = C::kChunkBytes;
  constexpr int kChunks = C::kTokens / kStoreTokens;
  const bool leader = threadIdx.x % 128 == 0;
  const uint32_t warpgroup_staging = staging + warpgroup * 2 * kChunkBytes;
  const bool bfloat16 = p.output_is_bfloat16;

  named_barrier_sync(1 + warpgroup, 128);  // the token scales are there
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    const uint32_t buffer = warpgroup_staging + (chunk % 2) * kChunkBytes;
    // All of a kind before the next kind: each load, conversion and transposition hides the latency of the others.
    constexpr int kOctets = kStoreTokens / 8;
    float2 scale[kOctets];
#pragma unroll
    for (int i = 0; i < kOctets; ++i) {
      scale[i] = *reinterpret_cast<const float2*>(token_scales + chunk * kStoreTokens + 8 * i + 2 * (lane % 4));
    }
    uint32_t pairs[kOctets][C::kBlocks][2];
#pragma unroll
    for (int i = 0; i < kOctets; ++i) {
#pragma unroll
      for (int j = 0; j < C::kBlocks; ++j) {
#pragma unroll
        for (int b = 0; b < 2; ++b) {
          const int index = 4 * (chunk * kOctets + i) + 2 * b;
          float low = scaled(sums[j][index], factors.channel_scale[j][b], scale[i].x);
          float high = scaled(sums[j][index + 1], factors.channel_scale[j][b], scale[i].y);
          if constexpr (kHasBias) {
            low = __fadd_rn(low, factors.bias[j][b]);
            high = __fadd_rn(high, factors.bias[j][b]);
          }
          pairs[i][j][b] = pack_outputs(low, high, bfloat16);
        }
      }
    }
    // Then a thread has two neighbouring features of one token.
#pragma unroll
    for (int i = 0; i < kOctets; ++i) {
#pragma unroll
      for (int j = 0; j < C::kBlocks; ++j) {
#pragma unroll
        for (int b = 0; b < 2; ++b) pairs[i][j][b] = transposed(pairs[i][j][b]);
      }
    }
    // The store that last read this buffer was two chunks ago.
    if (leader) tma_store_wait_read<1>();
    named_barrier_sync(1 + warpgroup, 128);
#pragma unroll
    for (int i = 0; i < kOctets; ++i) {
#pragma unroll
      for (int j = 0; j < C::kBlocks; ++j) {
#pragma unroll
        for (int b = 0; b < 2; ++b) {
          const int row = 8 * i + lane / 4;  // token of the chunk
          const int column = chunk_feature<C::kBlocks>(warp, lane % 4) + 16 * j + 8 * b;
          const uint32_t swizzled = (column % 64 / 8) ^ (row % 8);
          asm volatile("st.shared.b32 [%0], %1;" ::"r"(buffer + column / 64 * kStoreTokens * 128 + row * 128 +
                                                       swizzled * 16 + 4 * (lane % 4)),
                       "r"(pairs[i][j][b])
                       : "memory");
        }
      }
    }
    async_proxy_fence();
    named_barrier_sync(1 + warpgroup, 128);
    if (leader) {
#pragma unroll
      for (int panel = 0; panel < C::kBlocks; ++panel) {
        tma_store(&p.output, buffer + panel * kStoreTokens * 128, feature + 64 * panel, token + chunk * kStoreTokens);
      }
      tma_store_commit();
    }
  }
}

// A warpgroup's partial sums -> shared memory, [token][feature] with a pitch that spreads the banks.
template <class C>
__device__ __forceinline__ void store_partial(uint32_t partial, int warpgroup, int warp, int lane,
                                              const int32_t (&sums)[C::kBlocks][C::kTokens / 2]) {
  constexpr int kPitch = C::kPartialPitch;
  const int copy = C::kWarpRings ? 4 * warpgroup + warp : C::kDepthSplit ? warpgroup : 0;
  const int first_feature = C::kDepthSplit ? 0 : warpgroup * C::kWarpgroupFeatures;
#pragma unroll
  for (int j = 0; j < C::kBlocks; ++j) {
#pragma unroll
    for (int i = 0; i < C::kTokens / 8; ++i) {
#pragma unroll
      for (int b = 0; b < 2; ++b) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int token = 8 * i + 2 * (lane % 4) + e;
          const int chunk = C::kWarpRings ? 0 : chunk_feature<C::kBlocks>(warp, lane / 8);
          const int feature = first_feature + chunk + 16 * j + 8 * b + lane / 4;
          asm volatile("st.shared.s32 [%0], %1;" ::"r"(partial + 4 * ((copy * C::kTokens + token) * kPitch + feature)),
                       "r"(sums[j][4 * i + 2 * b + e])
                       : "memory");
        }
      }
    }
  }
}

// Adds the partial sums of the cluster's blocks that share this tile; each block finishes its share of the output, or
// leaves it to the reduction kernel.
// Called by the threads that multiply, after every block of the cluster has stored its sums. A thread keeps to its four
// features and walks over tokens, several at once, because a load from another block takes its time.
template <class C>
__device__ __forceinline__ void reduce_tile(const Parameters& p, uint32_t partial, const WorkTile& tile,
                                            const ColumnFactors& factors, int block_rank, int thread) {
  constexpr int kPitch = C::kPartialPitch;
  constexpr int kVectors = C::kFeatures / 4;             // of four features, a token
  constexpr int kRows = C::kConsumerThreads / kVectors;  // tokens that the block's threads take at once
  constexpr int kUnroll = C::kTokens <= 2 * kRows ? 2 : 4;
  const int split_rank = block_rank / p.multicast;
  const int first_rank = block_rank - split_rank * p.multicast;
  const int tokens = min(C::kTokens, p.num_tokens - tile.token);
  const int vector = thread % kVectors;
  const int column = tile.feature + 4 * vector;
  if (column >= p.out_features) return;
  const int stride = kRows * p.split;

  for (int first = split_rank * kRows + thread / kVectors; first < tokens; first += kUnroll * stride) {
    int4 sum[kUnroll];
    float token_scale[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int row = first + u * stride;
      sum[u] = {0, 0, 0, 0};
      token_scale[u] = row < tokens ? __ldg(p.token_scale + tile.token + row) : 0.0f;
    }
    for (int rank = 0; rank < p.split; ++rank) {
      const uint32_t remote = cluster_address(partial, first_rank + rank * p.multicast);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int row = first + u * stride;
        if (row >= tokens) break;
#pragma unroll
        for (int copy = 0; copy < C::kRings; ++copy) {
          const int4 part = cluster_load(remote + 4 * ((copy * C::kTokens + row) * kPitch + 4 * vector));
          sum[u].x += part.x;
          sum[u].y += part.y;
          sum[u].z += part.z;
          sum[u].w += part.w;
        }
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int row = first + u * stride;
      if (row >= tokens) break;
      if (p.scratch_split > 1) {
        const int64_t scratch_row = static_cast<int64_t>(tile.scratch_rank) * p.num_tokens + tile.token + row;
        __stcg(reinterpret_cast<int4*>(p.scratch + scratch_row * p.out_features + column), sum[u]);
      } else {
        factors.store(sum[u], token_scale[u], p.output_pointer, tile.token + row, column, p.out_features);
      }
    }
  }
}

}  // namespace marlin_qqq::cuda::sm90
