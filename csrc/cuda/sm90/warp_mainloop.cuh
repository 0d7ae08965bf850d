// The Hopper mainloop for the fewest tokens: every warp streams its own part of the inputs through its own ring and
// multiplies with mma.sync. The packed words of a tile's 64 features are one 16-byte load a packed row, and the
// activations that it fetches once serve all of them.
#pragma once

#include "cuda/common/mma.cuh"
#include "cuda/sm90/mainloop.cuh"

namespace marlin_qqq::cuda::sm90 {

// Sums of one tile's 64 features. sums[j][4 * i + 2 * b + e]: feature 16 * j + 8 * b + lane / 4, token 8 * i + 2 *
// (lane % 4) + e. `token_rows(block, stage)` is where the int8 rows of the inputs' block `block` are, `last_token` the
// last one of them. `stage_is_free(stage)` is called once for every stage that the warp has read.
template <class C, class TokenRows, class StageIsFree>
__device__ __forceinline__ void consume_in_warp(const Ring<C>& ring, RingPosition<C>& position, const WorkTile& tile,
                                                int lane, const TokenRows& token_rows, int last_token,
                                                StageIsFree& stage_is_free,
                                                int32_t (&sums)[C::kBlocks][C::kTokens / 2]) {
  static_assert(C::kBlocks == 4 && C::kFeatures == 64, "a warp takes the four chunks of one packed tile");
  constexpr int kOctets = C::kTokens / 8;
#pragma unroll
  for (int j = 0; j < C::kBlocks; ++j) {
#pragma unroll
    for (int i = 0; i < C::kTokens / 2; ++i) sums[j][i] = 0;
  }
  // Lane l gives the address of token l % 8, 16-byte piece l / 8 of the four that one load_matrix fetches: swizzled as
  // the copy engine wrote them.
  const uint32_t token_row = min(lane % 8, last_token);
  const uint32_t piece = lane / 8;
#pragma unroll 1
  for (int block = tile.stage_begin; block < tile.stage_end; ++block) {
    const int stage = position.stage;
    barrier_wait(ring.full(stage), position.phase);
    const uint32_t weights = ring.weights(stage) + 16 * lane;
    const uint32_t activations = token_rows(block, stage) + 128 * token_row;
    PackedStep<C> packed[2];
    fetch_step<C>(packed[0], weights, 0);
    Scales<C> scales;
    fetch_scales<C>(scales, ring.scales(stage) + 16 * (lane / 4));
    uint32_t b[kOctets][4];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (step % 2 == 0) {
#pragma unroll
        for (int i = 0; i < kOctets; ++i) {
          load_matrix(b[i], activations + 1024 * i + 16 * ((2 * step + piece) ^ token_row));
        }
      }
      if (step + 1 < kSteps) fetch_step<C>(packed[(step + 1) % 2], weights, step + 1);
#pragma unroll
      for (int j = 0; j < C::kBlocks; ++j) {
        uint32_t a[4];
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          const dequant::Columns columns = dequantize_word<C>(packed[step % 2].words[row][j], scales, j);
          a[2 * row] = columns.column0;
          a[2 * row + 1] = columns.column8;
        }
#pragma unroll
        for (int i = 0; i < kOctets; ++i) {
          mma_int8(*reinterpret_cast<int32_t(*)[4]>(&sums[j][4 * i]), a, b[i][2 * (step % 2)],
                   b[i][2 * (step % 2) + 1]);
        }
      }
    }
    __syncwarp();  // all lanes have read the stage
    stage_is_free(stage);
    position.advance();
  }
}

}  // namespace marlin_qqq::cuda::sm90
