// The Hopper mainloop for the fewest tokens: every warp streams its own part of the inputs through its own ring and
// multiplies with mma.sync. The packed words of a tile's 64 features are one 16-byte load a packed row, and the
// activations that it fetches once serve all of them.
#pragma once

#include "cuda/common/mma.cuh"
#include "cuda/sm90/mainloop.cuh"

namespace marlin_qqq::cuda::sm90 {

// The activations of two steps, for every octet of tokens, and their products.
template <class C>
struct WarpTokens {
  static constexpr int kOctets = C::kTokens / 8;
  uint32_t b[kOctets][4];

  // `address`: this lane's row of the stage, whose 16-byte pieces are swizzled as TMA wrote them; a lane
  // gives the address of piece lane / 8 of the four that one load_matrix fetches.
  __device__ __forceinline__ void load(uint32_t address, int step, uint32_t piece, uint32_t token_row) {
#pragma unroll
    for (int i = 0; i < kOctets; ++i) load_matrix(b[i], address + 1024 * i + 16 * ((2 * step + piece) ^ token_row));
  }

  __device__ __forceinline__ void multiply(int32_t (&sums)[C::kBlocks][C::kTokens / 2], const Operands<C>& operands,
                                           int step) const {
#pragma unroll
    for (int j = 0; j < C::kBlocks; ++j) {
#pragma unroll
      for (int i = 0; i < kOctets; ++i) {
        mma_int8(*reinterpret_cast<int32_t(*)[4]>(&sums[j][4 * i]), operands.a[j], b[i][2 * (step % 2)],
                 b[i][2 * (step % 2) + 1]);
      }
    }
  }
};

// A warp's words of its ring's stages, fetched a step ahead of the products, and from one stage to the next.
template <class C>
struct WarpWords {
  const Ring<C>& ring;
  const WeightReader<C>& reader;
  PackedStep<C> packed[2];
  PackedScales<C> packed_scales;
  Scales<C> scales;

  __device__ __forceinline__ WarpWords(const Ring<C>& ring, const WeightReader<C>& reader)
      : ring(ring), reader(reader) {}

  __device__ __forceinline__ void fetch_first_step(int stage) {
    fetch_packed_scales<C>(packed_scales, ring.scales(stage) + reader.scale_offset);
    fetch_step<C>(packed[0], ring.weights(stage) + reader.weight_offset, 0);
  }

  // The products of a stage whose first step has been fetched. That of the stage at `next` is, when it is there.
  // `activations`: this lane's row of the stage.
  __device__ __forceinline__ void multiply_stage(int stage, const RingPosition<C::kStages>& next, uint32_t activations,
                                                 uint32_t piece, uint32_t token_row, WarpTokens<C>& tokens,
                                                 int32_t (&sums)[C::kBlocks][C::kTokens / 2]) {
    const uint32_t weights = ring.weights(stage) + reader.weight_offset;
    bool next_is_full = false;
    prepare_scales<C>(scales, packed_scales);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (step % 2 == 0) tokens.load(activations, step, piece, token_row);
      // The next step's words, possibly of the next stage
      if (step + 1 < kSteps) {
        fetch_step<C>(packed[(step + 1) % 2], weights, step + 1);
      } else {
        if (!next_is_full) barrier_wait(ring.full(next.stage), next.phase);
        fetch_first_step(next.stage);
      }
      // Asked a step before it matters: the answer takes a while.
      if (step + 2 == kSteps) next_is_full = barrier_completed(ring.full(next.stage), next.phase);
      Operands<C> operands;
      dequantize_step<C, false>(operands, packed[step % 2], scales);
      tokens.multiply(sums, operands, step);
    }
  }
};

// Sums of one tile's 64 features. sums[j][4 * i + 2 * b + e]: feature 16 * j + 8 * b + lane / 4, token 8 * i + 2 *
// (lane % 4) + e. `token_rows(block, stage)` is where the int8 rows of the inputs' block `block` are, `last_token` the
// last one of them. `stage_is_free(stage)` is called once for every stage that the warp has read.
template <class C, class TokenRows, class StageIsFree>
__device__ __forceinline__ void consume_in_warp(const Ring<C>& ring, RingPosition<C::kStages>& position,
                                                const WorkTile& tile, int lane, const WeightReader<C>& reader,
                                                const StagesAhead<C>& ahead, const TokenRows& token_rows,
                                                int last_token, StageIsFree& stage_is_free,
                                                int32_t (&sums)[C::kBlocks][C::kTokens / 2]) {
  static_assert(C::kBlocks == 4 && C::kFeatures == 64, "a warp takes the four chunks of one packed tile");
#pragma unroll
  for (int j = 0; j < C::kBlocks; ++j) {
#pragma unroll
    for (int i = 0; i < C::kTokens / 2; ++i) sums[j][i] = 0;
  }
  const uint32_t token_row = min(lane % 8, last_token);
  const uint32_t piece = lane / 8;
  WarpTokens<C> tokens;
#pragma unroll
  for (int early = 0; early < C::kStagesAhead; ++early) {
    if (early >= ahead.count) break;
    barrier_wait(ring.full(early), 0);
    const uint32_t activations = token_rows(tile.stage_begin + early, early) + 128 * token_row;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (step % 2 == 0) tokens.load(activations, step, piece, token_row);
      tokens.multiply(sums, ahead.operands[early][step], step);
    }
    __syncwarp();  // all lanes have read the stage
    stage_is_free(early);
    position.advance();
  }
  if constexpr (C::kSharedAhead) {
#pragma unroll 1
    for (int early = ahead.count; early < ahead.count + ahead.in_shared; ++early) {
      barrier_wait(ring.full(early), 0);
      const uint32_t activations = token_rows(tile.stage_begin + early, early) + 128 * token_row;
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        if (step % 2 == 0) tokens.load(activations, step, piece, token_row);
        Operands<C> operands;
        ahead.load(operands, ring, early, step);
        tokens.multiply(sums, operands, step);
      }
      position.advance();  // the ring holds all inputs: no stage is filled again
    }
  }
  const int first_block = tile.stage_begin + ahead.count + ahead.in_shared;
  if (first_block >= tile.stage_end) return;

  if constexpr (C::kStagesAhead > 0) {
#pragma unroll 1
    for (int early = ahead.count; early < ahead.awaited; ++early) barrier_wait(ring.early_weights(early), 0);
  }
  WarpWords<C> words(ring, reader);
  barrier_wait(ring.full(position.stage), position.phase);
  words.fetch_first_step(position.stage);
#pragma unroll 1
  for (int block = first_block; block < tile.stage_end; ++block) {
    const int stage = position.stage;
    const uint32_t activations = token_rows(block, stage) + 128 * token_row;
    // After the last stage it is the last one's words that are read ahead, for nothing.
    if (block + 1 < tile.stage_end) position.advance();
    words.multiply_stage(stage, position, activations, piece, token_row, tokens, sums);
    __syncwarp();  // all lanes have read the stage
    stage_is_free(stage);
  }
}

}  // namespace marlin_qqq::cuda::sm90
