// The Hopper kernel for the fewest tokens and more tiles than multiprocessors (plan::Cooperation::kFlow): a block walks
// over tiles of 64 features, and what its warps stream flows on from one tile to the next. Nothing of a tile's end lies
// where the rings are, so they fill while it is worked on.
#pragma once

#include "cuda/common/cluster.cuh"
#include "cuda/common/shared_memory.cuh"
#include "cuda/sm90/config.cuh"
#include "cuda/sm90/flow_position.h"
#include "cuda/sm90/ring_sums.cuh"
#include "cuda/sm90/token_quantization.cuh"
#include "cuda/sm90/warp_mainloop.cuh"

namespace marlin_qqq::cuda::sm90 {

// What RingFill and StageRefill are for the rings of other tiles: the first fill, and the refill of a stage that has
// been read.
template <class C>
struct FlowFill {
  using Position = FlowPosition<C::kRings>;
  const Parameters& p;
  const Ring<C>& ring;
  const FlowTiles& tiles;
  Position first;
  Position next;  // to be filled

  __device__ __forceinline__ FlowFill(const Parameters& p, const Ring<C>& ring, const FlowTiles& tiles,
                                      const Position& first)
      : p(p), ring(ring), tiles(tiles), first(first), next(first) {}

  static __device__ __forceinline__ WorkTile work_tile(const Position& at) {
    return {0, C::kFeatures * at.tile, 0, 0, 0, false};
  }

  // By one thread; not unrolled, here and below: see RingFill.
  __device__ __forceinline__ void early() const {
    Position at = first;
#pragma unroll 1
    for (int i = 0; i < p.early_stages && !at.at_end(tiles); ++i) {
      if (p.early_into_ring) {
        load_weights<C>(p, ring, i, work_tile(at), at.stage);
      } else {
        prefetch_weights<C>(p, work_tile(at), at.stage, at.stage + 1);
      }
      at.advance(tiles);
    }
  }

  __device__ __forceinline__ void rest() const {
    Position at = first;
#pragma unroll 1
    for (int i = 0; i < used_stages<C>(p) && !at.at_end(tiles); ++i) {
      if (!p.early_into_ring || i >= p.early_stages) load_weights<C>(p, ring, i, work_tile(at), at.stage);
      load_activations<C>(p, ring, i, work_tile(at), at.stage, {1, 0, 0, 0});
      at.advance(tiles);
    }
  }

  // By all threads of the warp.
  __device__ __forceinline__ void skip_first() {
#pragma unroll 1
    for (int i = 0; i < used_stages<C>(p); ++i) next.advance(tiles);
  }

  __device__ __forceinline__ void refill(int stage) {
    if (!next.at_end(tiles) && elect_thread()) {
      load_weights<C>(p, ring, stage, work_tile(next), next.stage);
      load_activations<C>(p, ring, stage, work_tile(next), next.stage, {1, 0, 0, 0});
    }
    next.advance(tiles);
  }
};

// A thread's share of a tile's end: four features of every kRows-th token. Of a tile that two blocks share, each
// finishes half of the features, and sends the other its sums of the other half.
template <class C>
struct FlowOutput {
  static constexpr int kVectors = C::kFeatures / 4;  // of four features
  static constexpr int kHalf = kVectors / 2;
  static constexpr int kRows = C::kConsumerThreads / kVectors;
  static constexpr int kUnroll = (C::kTokens + kRows - 1) / kRows;
  const Parameters& p;
  uint32_t received;  // [tokens][kHalf] vectors
  uint32_t barrier;   // that they have arrived
  int vector;
  int first_row;
  float token_scale[kUnroll];

  __device__ __forceinline__ FlowOutput(const Parameters& p, uint32_t shared)
      : p(p),
        received(shared + C::kFlowReceivedOffset),
        barrier(shared + C::kExchangeBarrierOffset),
        vector(static_cast<int>(threadIdx.x) % kVectors),
        first_row(static_cast<int>(threadIdx.x) / kVectors) {}

  // By one thread, before the blocks of the cluster meet.
  __device__ __forceinline__ void expect() const { barrier_arrive_expect(barrier, p.num_tokens * kHalf * 16); }

  // When the tokens' scales are there. From L2: see reduce_tile.
  __device__ __forceinline__ void load_scales(uint32_t shared) {
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int row = first_row + i * kRows;
      token_scale[i] = row >= p.num_tokens ? 0.0f
                       : C::kQuantizes     ? __uint_as_float(shared_load(shared + C::kTokenScaleOffset + 4 * row))
                                           : __ldcg(p.token_scale + row);
    }
  }

  // From a tile's sums, which are zero then.
  __device__ __forceinline__ void store(uint32_t tile_sums, const ColumnFactors& factors, int feature, bool is_shared,
                                        int block_rank) const {
    const bool own = vector / kHalf == block_rank;
    int4 sum[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int row = first_row + i * kRows;
      if (row >= p.num_tokens) break;
      const uint32_t address = tile_sums + 4 * row * C::kPartialPitch + 16 * vector;
      sum[i] = shared_load_int4(address);
      shared_store(address, make_int4(0, 0, 0, 0));
      if (is_shared && !own) {
        cluster_store_async(cluster_address(received + 16 * (row * kHalf + vector % kHalf), block_rank ^ 1), sum[i],
                            cluster_address(barrier, block_rank ^ 1));
      }
    }
    if (is_shared) {
      barrier_wait(barrier, 0);
      if (!own) return;
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int row = first_row + i * kRows;
      if (row >= p.num_tokens) break;
      if (is_shared) add_sums(sum[i], shared_load_int4(received + 16 * (row * kHalf + vector % kHalf)));
      factors.store(sum[i], token_scale[i], p.output_pointer, row, feature + 4 * vector, p.out_features);
    }
  }
};

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocksPerSm) flow_kernel(const __grid_constant__ Parameters p) {
  extern __shared__ uint8_t dynamic_shared_memory[];
  uint32_t shared = (shared_address(dynamic_shared_memory) + 1023) & ~1023u;
  asm volatile("" : "+r"(shared));  // kept, not computed anew for every stage
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  const int lane = threadIdx.x % 32;
  const int block_rank = p.split > 1 ? static_cast<int>(cluster_block_rank()) : 0;
  FlowOutput<C> output(p, shared);

  // The next kernel may start once all blocks of this one have: it waits for our results itself.
  allow_next_kernel();
  const auto ring = Ring<C>::of(shared, warp);
  if (elect_thread()) {
    prepare_copies<C>(p, shared, ring, warp == 0);
    if (warp == 0) output.expect();
  }
  clear_sums<C>(shared);
  const FlowTiles tiles = {p.stage_count, p.whole_works, p.works, static_cast<int>(gridDim.x), p.split > 1};
  FlowPosition<C::kRings> at(static_cast<int>(blockIdx.x), block_rank, warp);
  FlowFill<C> fill(p, ring, tiles, at);
  if (elect_thread()) fill.early();
  __syncthreads();
  if (p.split > 1) cluster_arrive();
  wait_for_previous_kernel();
  if constexpr (C::kQuantizes) {
    const auto quantize = [&](auto row) {
      row.load();  // ahead of the rest of the weights, which take the same way
      if (elect_thread()) fill.rest();
      __syncwarp();
      row.quantize(shared, {0, 0, 0, p.stage_count, 0, false});
    };
    if (p.x_is_bfloat16) {
      quantize(TokenRow<C, __nv_bfloat16>(p, warp, lane));
    } else {
      quantize(TokenRow<C, __half>(p, warp, lane));
    }
  } else {
    if (elect_thread()) fill.rest();
    __syncwarp();
  }
  fill.skip_first();
  output.load_scales(shared);
  if (p.split > 1) cluster_wait();  // the other block's barriers are there

  const WeightReader<C> reader(0, 0, lane);
  const QuantizedTokens<C> quantized(p, shared);
  const uint32_t token_row = min(lane % 8, C::kQuantizes ? p.num_tokens - 1 : 7);
  const uint32_t piece = lane / 8;
  WarpTokens<C> tokens;
  WarpWords<C> words(ring, reader);
  auto position = ring_begin<C>(p);
  uint32_t tile_sums = shared + C::kSumOffset;
  uint32_t other_sums = tile_sums + C::kTile.sum_bytes();
  barrier_wait(ring.full(0), 0);
  words.fetch_first_step(0);
#pragma unroll 1
  while (!at.at_end(tiles)) {
    const int tile = at.tile;
    const bool is_shared = at.shared();
    const int feature = C::kFeatures * tile;
    // Fetched before the sums meet.
    const ColumnFactors factors(p.channel_scale, p.bias, feature + 4 * output.vector, p.output_is_bfloat16);
    int32_t sums[C::kBlocks][C::kTokens / 2];
#pragma unroll
    for (int j = 0; j < C::kBlocks; ++j) {
#pragma unroll
      for (int i = 0; i < C::kTokens / 2; ++i) sums[j][i] = 0;
    }
#pragma unroll 1
    do {
      const int stage = position.stage;
      const uint32_t activations = C::kQuantizes ? quantized.row(at.stage, 0) : ring.activations(stage);
      at.advance(tiles);
      // After the last stage of all it is that one's words that are read ahead, for nothing.
      if (!at.at_end(tiles)) position.advance();
      words.multiply_stage(stage, position, activations + 128 * token_row, piece, token_row, tokens, sums);
      __syncwarp();  // all lanes have read the stage
      fill.refill(stage);
    } while (at.tile == tile);
    add_sums_of_ring<C>(tile_sums, 0, lane, sums);
    // Warps that are ahead add to the other sums meanwhile, which were taken before the last time here.
    named_barrier_sync(kPartialSums, C::kConsumerThreads);
    output.store(tile_sums, factors, feature, is_shared, block_rank);
    const uint32_t taken = tile_sums;
    tile_sums = other_sums;
    other_sums = taken;
  }
}

}  // namespace marlin_qqq::cuda::sm90
