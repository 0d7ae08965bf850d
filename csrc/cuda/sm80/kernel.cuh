// The mma.sync kernel for sm_80 and later: each block walks its part of the work (config.cuh). Sums of tiles that
// several blocks share go to a scratch buffer, where the kernel of reduction.cuh adds them: no block waits for another.
#pragma once

#include "cuda/common/dependent_launch.cuh"
#include "cuda/common/output.cuh"
#include "cuda/sm80/mainloop.cuh"

namespace marlin_qqq::cuda::sm80 {

// Adds the depth warps' sums of the tile in shared memory, eight tokens of each warp at a time, and hands them on:
// `sink(token, prepared, int4)` gets the sums of the four features from 4 * (threadIdx.x % kVectors) on,
// `prepare(token)` is called ahead of it, so that what it loads arrives meanwhile. Tokens count from the tile's first.
template <class C, class Prepare, class Sink>
__device__ __forceinline__ void gather_sums(uint32_t shared, int warp_feature, int token_warp, int depth_warp, int lane,
                                            const Sums<C>& sums, Prepare prepare, Sink sink) {
  constexpr int kRows = C::kTokenWarps * C::kPassTokens;
  constexpr int kVectorsOfThread = kRows / C::kRowStep;
  static_assert(kRows % C::kRowStep == 0);
  const int first_row = threadIdx.x / C::kVectors;
  const uint32_t source = shared + 4 * first_row * C::kPartialPitch + 16 * (threadIdx.x % C::kVectors);
  const uint32_t target =
      shared + 4 * (((depth_warp * C::kTokenWarps + token_warp) * C::kPassTokens + 2 * (lane % 4)) * C::kPartialPitch +
                    warp_feature + lane / 4);
#pragma unroll
  for (int pass = 0; pass < C::kWarpTokens / C::kPassTokens; ++pass) {
    int token[kVectorsOfThread];
    decltype(prepare(0)) prepared[kVectorsOfThread];
#pragma unroll
    for (int n = 0; n < kVectorsOfThread; ++n) {
      const int row = first_row + n * C::kRowStep;
      token[n] = row / C::kPassTokens * C::kWarpTokens + pass * C::kPassTokens + row % C::kPassTokens;
      prepared[n] = prepare(token[n]);
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < C::kChunks; ++j) {
#pragma unroll
      for (int value = 0; value < 4; ++value) {
        asm volatile(
            "st.shared.s32 [%0], %1;" ::"r"(target + 4 * (value % 2 * C::kPartialPitch + 16 * j + 8 * (value / 2))),
            "r"(sums[j][pass][value])
            : "memory");
      }
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < kVectorsOfThread; ++n) {
      int4 total = {0, 0, 0, 0};
#pragma unroll
      for (int d = 0; d < C::kDepthWarps; ++d) {
        const int4 part = shared_load_int4(source + 4 * ((d * kRows + n * C::kRowStep) * C::kPartialPitch));
        add_sums(total, part);
      }
      sink(token[n], prepared[n], total);
    }
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocksPerSm) gemm_kernel(const __grid_constant__ Parameters p) {
  extern __shared__ __align__(128) uint8_t dynamic_shared_memory[];
  const uint32_t shared = shared_address(dynamic_shared_memory);
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int warp_feature = warp % C::kFeatureWarps * C::kWarpFeatures;
  const int token_warp = warp / C::kFeatureWarps % C::kTokenWarps;
  const int depth_warp = warp / (C::kFeatureWarps * C::kTokenWarps);

  // The next kernel may start once all blocks of this one have: it waits for our results itself.
  allow_next_kernel();

  // Work
  auto position = Position::first(p.work);
  int count = p.work.first_unit(blockIdx.x + 1) - p.work.first_unit(blockIdx.x);  // of units still to be multiplied
  if (blockIdx.x < p.work.whole) count += ((p.work.whole - 1 - blockIdx.x) / p.work.blocks + 1) * p.work.units;

  // First fill. Weights do not depend on the kernel before this one when the caller has promised so.
  Feeder<C> feeder(p, position);
  if (p.constant_weights) {
    Feeder<C> ahead = feeder;
#pragma unroll 1
    for (int i = 0; i < min(C::kStages, count); ++i) {
      ahead.copy_weights(shared + i * C::kStageBytes);
      ahead.advance();
    }
  }
  wait_for_previous_kernel();
#pragma unroll 1
  for (int i = 0; i < C::kStages; ++i) {
    if (i < count) {
      if (!p.constant_weights) feeder.copy_weights(shared + i * C::kStageBytes);
      feeder.copy_activations(shared + i * C::kStageBytes);
      feeder.advance();
    }
    copy_async_commit();
  }

  // Mainloop: the operands of a step are read while the step before is multiplied.
  const Reader<C> reader(warp_feature, token_warp * C::kWarpTokens, depth_warp, lane);
  Operands<C> operands[2];
  uint32_t next_scales[C::kChunks];
  Sums<C> sums = {};
  uint32_t stage = shared;
  copy_async_wait<C::kStages - 1>();
  __syncthreads();
  reader.read(operands[0], stage, 0);
  reader.read_scales(next_scales, stage);
  int left = p.work.units - position.unit;
#pragma unroll 1
  while (true) {
    Scales<C> scales;
    if constexpr (C::kGrouped) {
#pragma unroll
      for (int j = 0; j < C::kChunks; ++j) scales[j] = dequant::group_scales(next_scales[j]);
    }
    static_assert(C::kSteps % 2 == 0, "the operands' two buffers change places with every step");
#pragma unroll
    for (int step = 0; step < C::kSteps; ++step) {
      if (step + 1 < C::kSteps) {
        reader.read(operands[(step + 1) % 2], stage, step + 1);
      } else {
        copy_async_wait<C::kStages - 2>();
        __syncthreads();  // the next stage has arrived for all, and all have read this one, which is filled again
        if (count > C::kStages) {
          feeder.copy_weights(stage);
          feeder.copy_activations(stage);
          feeder.advance();
        }
        copy_async_commit();
        stage = stage == shared + (C::kStages - 1) * C::kStageBytes ? shared : stage + C::kStageBytes;
        reader.read(operands[(step + 1) % 2], stage, 0);
        reader.read_scales(next_scales, stage);
      }
      multiply<C>(operands[step % 2], scales, sums);
    }
    --count;
    if (--left > 0 && count > 0) continue;

    // End of the tile, or of the block's part of it
    const int tile = position.tile;
    const int token = tile % p.work.token_tiles * C::kTokens;
    const int tokens = p.num_tokens - token;
    const int column = 4 * (threadIdx.x % C::kVectors);
    const int feature = tile / p.work.token_tiles * C::kFeatures + column;
    const uint32_t exchange = shared + C::kStages * C::kStageBytes;
    if (position.unit == 0 && left == 0) {
      const bool inside = feature < p.out_features;
      const ColumnFactors factors(p.channel_scale, p.bias, inside ? feature : 0, p.output_is_bfloat16);
      gather_sums<C>(
          exchange, warp_feature, token_warp, depth_warp, lane, sums,
          [&](int row) { return row < tokens ? p.token_scale[token + row] : 0.0f; },
          [&](int row, float token_scale, int4 total) {
            if (row < tokens && inside) {
              factors.store(total, token_scale, p.output, token + row, feature, p.out_features);
            }
          });
    } else {
      const bool second = tile != p.work.whole + p.work.first_unit(blockIdx.x) / p.work.units;
      int32_t* partial = p.partials + static_cast<int64_t>(2 * blockIdx.x + second) * C::kTileSums + column;
      gather_sums<C>(
          exchange, warp_feature, token_warp, depth_warp, lane, sums, [](int) { return 0; },
          [&](int row, int, int4 total) {
            if (row < tokens) __stcg(reinterpret_cast<int4*>(partial + row * C::kFeatures), total);
          });
    }
    if (count == 0) return;
#pragma unroll
    for (int j = 0; j < C::kChunks; ++j) {
#pragma unroll
      for (int i = 0; i < C::kTokenBlocks; ++i) {
#pragma unroll
        for (int value = 0; value < 4; ++value) sums[j][i][value] = 0;
      }
    }
    position.next_tile(p.work);
    left = p.work.units - position.unit;
  }
}

}  // namespace marlin_qqq::cuda::sm80
