// The mma.sync kernel for sm_80 and later: one block a tile and slice of the inputs. Blocks that share a tile leave
// their int32 sums in a scratch buffer, and whichever arrives last adds them up: no block ever waits for another.
#pragma once

#include "cuda/common/output.cuh"
#include "cuda/sm80/mainloop.cuh"

namespace marlin_qqq::cuda::sm80 {

// Gives `sink(token, feature, int4)` the tile's sums, four neighbouring features at a time, coordinates relative to the
// tile: adds the depth warps' sums in shared memory, `kPassTokens` tokens of each warp at a time.
template <class C, class Sink>
__device__ __forceinline__ void gather_sums(uint32_t shared, int warp_feature, int token_warp, int depth_warp, int lane,
                                            const Sums<C>& sums, Sink sink) {
  constexpr int kRows = C::kTokenWarps * C::kPassTokens;
  constexpr int kVectors = C::kFeatures / 4;
#pragma unroll
  for (int pass = 0; pass < C::kWarpTokens / C::kPassTokens; ++pass) {
    __syncthreads();
#pragma unroll
    for (int j = 0; j < C::kChunks; ++j) {
#pragma unroll
      for (int i = 0; i < C::kPassTokens / 8; ++i) {
#pragma unroll
        for (int value = 0; value < 4; ++value) {
          const int row =
              (depth_warp * C::kTokenWarps + token_warp) * C::kPassTokens + 8 * i + 2 * (lane % 4) + value % 2;
          const int feature = warp_feature + 16 * j + 8 * (value / 2) + lane / 4;
          asm volatile("st.shared.s32 [%0], %1;" ::"r"(shared + 4 * (row * C::kPartialPitch + feature)),
                       "r"(sums[j][pass * (C::kPassTokens / 8) + i][value])
                       : "memory");
        }
      }
    }
    __syncthreads();
    for (int v = threadIdx.x; v < kRows * kVectors; v += C::kThreads) {
      const int row = v / kVectors;
      const int feature = 4 * (v % kVectors);
      int4 total = {0, 0, 0, 0};
#pragma unroll
      for (int d = 0; d < C::kDepthWarps; ++d) {
        int4 part;
        asm volatile("ld.shared.v4.s32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(part.x), "=r"(part.y), "=r"(part.z), "=r"(part.w)
                     : "r"(shared + 4 * ((d * kRows + row) * C::kPartialPitch + feature))
                     : "memory");
        total.x += part.x;
        total.y += part.y;
        total.z += part.z;
        total.w += part.w;
      }
      sink(row / C::kPassTokens * C::kWarpTokens + pass * C::kPassTokens + row % C::kPassTokens, feature, total);
    }
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocksPerSm) gemm_kernel(const Parameters p) {
  extern __shared__ __align__(128) uint8_t dynamic_shared_memory[];
  const uint32_t shared = shared_address(dynamic_shared_memory);
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int feature_warp = warp % C::kFeatureWarps;
  const int token_warp = warp / C::kFeatureWarps % C::kTokenWarps;
  const int depth_warp = warp / (C::kFeatureWarps * C::kTokenWarps);

  // Work: token tiles are neighbours, so that blocks which run together share weights in L2.
  const int tiles = p.token_tiles * p.feature_tiles;
  const int tile = blockIdx.x % tiles;
  const int split_rank = blockIdx.x / tiles;
  const int token = tile % p.token_tiles * C::kTokens;
  const int feature = tile / p.token_tiles * C::kFeatures;
  const int stage_count = p.in_features / C::kDepth;
  const int begin = static_cast<int>(static_cast<int64_t>(stage_count) * split_rank / p.split);
  const int end = static_cast<int>(static_cast<int64_t>(stage_count) * (split_rank + 1) / p.split);

  // Mainloop
  Sums<C> sums = {};
#pragma unroll
  for (int i = 0; i < C::kStages - 1; ++i) {
    if (begin + i < end) load_stage<C>(p, shared + i * C::kStageBytes, token, feature, begin + i);
    copy_async_commit();
  }
  int read_stage = 0;
  int write_stage = C::kStages - 1;
  for (int block = begin; block < end; ++block) {
    copy_async_wait<C::kStages - 2>();
    __syncthreads();  // this stage has arrived for all, and all are done with the one that is refilled next
    if (block + C::kStages - 1 < end) {
      load_stage<C>(p, shared + write_stage * C::kStageBytes, token, feature, block + C::kStages - 1);
    }
    copy_async_commit();
    multiply_stage<C>(shared + read_stage * C::kStageBytes, feature_warp * C::kWarpFeatures,
                      token_warp * C::kWarpTokens, depth_warp, lane, sums);
    read_stage = read_stage + 1 == C::kStages ? 0 : read_stage + 1;
    write_stage = write_stage + 1 == C::kStages ? 0 : write_stage + 1;
  }
  copy_async_wait<0>();

  // Epilogue
  const auto write_output = [&](int row, int column, int4 total) {
    if (token + row < p.num_tokens && feature + column < p.out_features) {
      store_outputs(total, p.token_scale[token + row], p.channel_scale, p.bias, p.output, token + row, feature + column,
                    p.out_features, p.output_is_bfloat16);
    }
  };
  if (p.split == 1) {
    gather_sums<C>(shared, feature_warp * C::kWarpFeatures, token_warp, depth_warp, lane, sums, write_output);
    return;
  }

  // Reduction over the blocks of this tile
  constexpr int kTileSums = C::kTokens * C::kFeatures;
  int32_t* mine = p.partials + (static_cast<int64_t>(split_rank) * tiles + tile) * kTileSums;
  gather_sums<C>(shared, feature_warp * C::kWarpFeatures, token_warp, depth_warp, lane, sums,
                 [&](int row, int column, int4 total) {
                   if (token + row < p.num_tokens)
                     __stcg(reinterpret_cast<int4*>(mine + row * C::kFeatures + column), total);
                 });
  __threadfence();
  __shared__ bool is_last;
  __syncthreads();
  if (threadIdx.x == 0) is_last = atomicAdd(p.counters + tile, 1u) == static_cast<uint32_t>(p.split) - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  for (int v = threadIdx.x; v < kTileSums / 4; v += C::kThreads) {
    const int row = v / (C::kFeatures / 4);
    const int column = 4 * (v % (C::kFeatures / 4));
    if (token + row >= p.num_tokens) break;
    int4 total = {0, 0, 0, 0};
    for (int s = 0; s < p.split; ++s) {
      const int4 part = __ldcg(
          reinterpret_cast<const int4*>(p.partials + (static_cast<int64_t>(s) * tiles + tile) * kTileSums + 4 * v));
      total.x += part.x;
      total.y += part.y;
      total.z += part.z;
      total.w += part.w;
    }
    write_output(row, column, total);
  }
}

}  // namespace marlin_qqq::cuda::sm80
