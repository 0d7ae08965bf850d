// Adds the sums that blocks which share a tile have left in scratch, and finishes the output. A kernel of its own in
// place of a counter a tile: scratch needs no zeros, nothing is left behind by an aborted launch, and all
// multiprocessors add.
#pragma once

#include "cuda/common/dependent_launch.cuh"
#include "cuda/common/output.cuh"
#include "cuda/sm80/config.cuh"

namespace marlin_qqq::cuda::sm80 {

inline constexpr int kReductionThreads = 128;
inline constexpr int kReductionTokens = 2;  // of a block
inline constexpr int kReductionBatch = 4;   // parts that are on their way at once

// blockIdx.y is the shared tile, blockIdx.x which tokens of it. A thread adds four neighbouring features of a token at
// a time.
__global__ void __launch_bounds__(kReductionThreads)
    reduce_kernel(const __grid_constant__ Parameters p, int tile_tokens, int tile_features) {
  allow_next_kernel();
  const uint32_t tile = p.work.whole + blockIdx.y;
  const uint32_t first_unit = blockIdx.y * p.work.units;
  const int first = p.work.block_of(first_unit);
  const int last = p.work.block_of(first_unit + p.work.units - 1);
  const int second = p.work.first_unit(first) < first_unit;  // the first block began in an earlier tile
  const int vectors = tile_features / 4;
  const int column = 4 * (threadIdx.x % vectors);
  const int feature = tile / p.work.token_tiles * tile_features + column;
  const int token = tile % p.work.token_tiles * tile_tokens;
  const int end = min(min((blockIdx.x + 1) * kReductionTokens, tile_tokens), p.num_tokens - token);
  const int64_t tile_sums = static_cast<int64_t>(tile_tokens) * tile_features;
  wait_for_previous_kernel();
  if (first == last || feature >= p.out_features) return;  // one block had the whole tile
  const ColumnFactors factors(p.channel_scale, p.bias, feature, p.output_is_bfloat16);
  for (int row = blockIdx.x * kReductionTokens + threadIdx.x / vectors; row < end; row += kReductionThreads / vectors) {
    const int32_t* place = p.partials + row * tile_features + column;
    int4 total = __ldcg(reinterpret_cast<const int4*>(place + (2 * first + second) * tile_sums));
    for (int block = first + 1; block <= last; block += kReductionBatch) {
      int4 parts[kReductionBatch];
#pragma unroll
      for (int i = 0; i < kReductionBatch; ++i) {
        parts[i] = {0, 0, 0, 0};
        if (block + i <= last) {
          parts[i] = __ldcg(reinterpret_cast<const int4*>(place + 2 * (block + i) * tile_sums));
        }
      }
#pragma unroll
      for (int i = 0; i < kReductionBatch; ++i) {
        add_sums(total, parts[i]);
      }
    }
    factors.store(total, p.token_scale[token + row], p.output, token + row, feature, p.out_features);
  }
}

}  // namespace marlin_qqq::cuda::sm80
