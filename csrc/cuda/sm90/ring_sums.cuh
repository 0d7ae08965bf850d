// The end of a tile whose inputs are shared out: among the rings of a block, the blocks of a cluster, or clusters.
// Their sums meet in shared memory, are exchanged between blocks, and go from there to the output or to scratch.
#pragma once

#include "cuda/common/barrier.cuh"
#include "cuda/common/cluster.cuh"
#include "cuda/common/output.cuh"
#include "cuda/common/shared_memory.cuh"
#include "cuda/sm90/config.cuh"
#include "cuda/sm90/copies.cuh"

namespace marlin_qqq::cuda::sm90 {

// What the end of a tile that rings share needs besides sums: asked for before they multiply, so that nothing waits for
// it when the sums are there. From L2: other kernels' blocks on this multiprocessor may have brought to L1 what was
// there before this kernel's wait.
template <class C>
struct RingFactors {
  static constexpr int kScalesPerThread = (C::kTokens + C::kConsumerThreads - 1) / C::kConsumerThreads;
  uint32_t shared;
  // Token scales arrive like the activations. Channel scales and biases may come from memory, behind many weights: a
  // register that waits for them would hold up the products' own loads, which share a few counters with it. So they go
  // to shared memory.
  float token_scale[kScalesPerThread];

  explicit __device__ __forceinline__ RingFactors(uint32_t shared) : shared(shared) {}

  static __device__ __forceinline__ int row(int i) { return static_cast<int>(threadIdx.x) + i * C::kConsumerThreads; }

  // By the threads that multiply, when all that may be read.
  __device__ __forceinline__ void fetch(const Parameters& p, const WorkTile& tile) {
    constexpr int kScales = C::kFeatures / 4;  // vectors of 16 bytes
    constexpr int kBiases = C::kFeatures / 8;
    const int vector = C::kConsumerThreads - 1 - static_cast<int>(threadIdx.x);
    const int features = p.out_features - tile.feature;  // of a tile that sticks out fewer than its own
    if (vector < kScales) {
      if (4 * vector < features) {
        copy_async(shared + C::kChannelScaleOffset + 16 * vector, p.channel_scale + tile.feature + 4 * vector);
      }
    } else if (vector < kScales + kBiases && p.bias != nullptr) {
      const int column = 8 * (vector - kScales);
      if (column < features) {
        copy_async(shared + C::kBiasOffset + 2 * column, static_cast<const uint16_t*>(p.bias) + tile.feature + column);
      }
    }
    if constexpr (C::kQuantizes) return;  // a kernel that quantises has written the token scales
#pragma unroll
    for (int i = 0; i < kScalesPerThread; ++i) {
      token_scale[i] = row(i) < C::kTokens ? __ldcg(p.token_scale + min(tile.token + row(i), p.num_tokens - 1)) : 0.0f;
    }
  }

  // By the same threads, before they meet.
  __device__ __forceinline__ void hand_over() const {
    copy_async_wait_all();
    if constexpr (C::kQuantizes) return;
#pragma unroll
    for (int i = 0; i < kScalesPerThread; ++i) {
      if (row(i) < C::kTokens) {
        shared_store(shared + C::kTokenScaleOffset + 4 * row(i), __float_as_uint(token_scale[i]));
      }
    }
  }
};

// Every sum of a thread's part of a tile, with its place there: sums[j][4 * i + 2 * b + e], see consume.
template <class C, class Visit>
__device__ __forceinline__ void for_each_sum(const int32_t (&sums)[C::kBlocks][C::kTokens / 2], const Visit& visit) {
#pragma unroll
  for (int j = 0; j < C::kBlocks; ++j) {
#pragma unroll
    for (int i = 0; i < C::kTokens / 8; ++i) {
#pragma unroll
      for (int b = 0; b < 2; ++b) {
#pragma unroll
        for (int e = 0; e < 2; ++e) visit(j, i, b, e, sums[j][4 * i + 2 * b + e]);
      }
    }
  }
}

// A warpgroup's partial sums -> shared memory, [token][feature] with a pitch that spreads the banks.
template <class C>
__device__ __forceinline__ void store_partial(uint32_t partial, int warpgroup, int warp, int lane,
                                              const int32_t (&sums)[C::kBlocks][C::kTokens / 2]) {
  static_assert(!C::kWarpRings, "there is room for the sums of warps beside their rings");
  const int copy = C::kDepthSplit ? warpgroup : 0;
  const int first_feature = warpgroup * C::kFeatureStride;
  for_each_sum<C>(sums, [&](int j, int i, int b, int e, int32_t sum) {
    const int token = 8 * i + 2 * (lane % 4) + e;
    const int chunk = chunk_feature<C::kBlocks>(warp, lane / 8);
    const int feature = first_feature + chunk + 16 * j + 8 * b + lane / 4;
    shared_store(partial + 4 * ((copy * C::kTokens + token) * C::kPartialPitch + feature), static_cast<uint32_t>(sum));
  });
}

// Where sums meet beside the rings: zero, by all threads of the block, who meet before the first sum is added.
template <class C>
__device__ __forceinline__ void clear_sums(uint32_t shared) {
  constexpr int kBytes = C::kTile.sums_apart_tiles() * C::kTile.sum_bytes();
#pragma unroll
  for (int i = 0; i < kBytes; i += 16 * C::kThreads) {
    const int offset = i + 16 * static_cast<int>(threadIdx.x);
    if (offset < kBytes) shared_store(shared + C::kSumOffset + offset, make_int4(0, 0, 0, 0));
  }
}

// A thread's sums of a tile, added to those of the block's other rings: exact in any order. Those of tokens beyond the
// last are added, too, which nobody reads: one address then does for all.
template <class C>
__device__ __forceinline__ void add_sums_of_ring(uint32_t tile_sums, int warp, int lane,
                                                 const int32_t (&sums)[C::kBlocks][C::kTokens / 2]) {
  const int chunk = C::kWarpRings ? 0 : chunk_feature<C::kBlocks>(warp, lane / 8);
  uint32_t first = tile_sums + 4 * (2 * (lane % 4) * C::kPartialPitch + chunk + lane / 4);
  asm volatile("" : "+r"(first));  // kept, not computed anew for every sum
  for_each_sum<C>(sums, [&](int j, int i, int b, int e, int32_t sum) {
    shared_add(first + 4 * ((8 * i + e) * C::kPartialPitch + 16 * j + 8 * b), sum);
  });
}

// Adds the partial sums of a block's rings, and those of the cluster's blocks that share the tile. Each block finishes
// a share of the tokens, or leaves it to the reduction kernel (whole tiles of one block each then); it sends the others
// what it has of theirs, its rings added up. Called by the threads that multiply, when the block's sums lie in shared
// memory and the cluster's blocks are done with their stages. A thread keeps to its four features and walks over
// tokens.
template <class C>
__device__ __forceinline__ void reduce_tile(const Parameters& p, uint32_t shared, const WorkTile& tile, int block_rank,
                                            int thread) {
  constexpr int kVectors = C::kFeatures / 4;             // of four features, a token
  constexpr int kRows = C::kConsumerThreads / kVectors;  // tokens that the block's threads take at once
  constexpr int kUnroll = C::kTokens <= 2 * kRows ? 2 : 4;
  const int tokens = min(C::kTokens, p.num_tokens - tile.token);
  const int vector = thread % kVectors;
  const int column = tile.feature + 4 * vector;
  const uint32_t partial = shared + (C::kSumsApart ? C::kSumOffset : C::kPartialOffset) + 16 * vector;
  const uint32_t received = shared + C::kReceivedOffset + 16 * vector;
  const uint32_t barrier = shared + C::kExchangeBarrierOffset;
  const auto ring_sums = [&](int row) {
    int4 sum = {0, 0, 0, 0};
#pragma unroll
    for (int ring = 0; ring < (C::kSumsApart ? 1 : C::kRings); ++ring) {
      add_sums(sum, shared_load_int4(partial + 4 * (ring * C::kTokens + row) * C::kPartialPitch));
    }
    return sum;
  };

  const int block_rows = p.split == 1 ? tokens : (tokens + p.split - 1) / p.split;
  const int first_row = block_rank * block_rows;
  const int last_row = min(first_row + block_rows, tokens);
  if (p.split > 1) {
    if (thread == 0) {
      barrier_arrive_expect(barrier, (p.split - 1) * max(last_row - first_row, 0) * C::kFeatures * 4);
    }
    for (int row = thread / kVectors; row < tokens; row += kRows) {
      const int owner = row / block_rows;
      if (owner == block_rank) continue;
      const int slot = (block_rank - (block_rank > owner)) * block_rows + row - owner * block_rows;
      cluster_store_async(cluster_address(received + slot * C::kFeatures * 4, owner), ring_sums(row),
                          cluster_address(barrier, owner));
    }
    barrier_wait(barrier, 0);
  }
  if (column >= p.out_features) return;
  ColumnFactors factors;  // not where warpgroups share their ring, whose sums only go to scratch
  if constexpr (C::kDepthSplit) {
    factors = ColumnFactors(shared + C::kChannelScaleOffset, shared + C::kBiasOffset, 4 * vector, p.bias != nullptr,
                            p.output_is_bfloat16);
  }

  for (int first = first_row + thread / kVectors; first < last_row; first += kUnroll * kRows) {
    int4 sum[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) sum[u] = ring_sums(min(first + u * kRows, C::kTokens - 1));
    for (int sender = 0; sender < p.split - 1; ++sender) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int slot = sender * block_rows + first + u * kRows - first_row;
        if (first + u * kRows < last_row) add_sums(sum[u], shared_load_int4(received + slot * C::kFeatures * 4));
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int row = first + u * kRows;
      if (row >= last_row) break;
      if (!C::kDepthSplit || p.scratch_split > 1) {
        const int64_t scratch_row = static_cast<int64_t>(tile.scratch_rank) * p.num_tokens + tile.token + row;
        __stcg(reinterpret_cast<int4*>(p.scratch + scratch_row * p.out_features + column), sum[u]);
      } else {
        const float token_scale = __uint_as_float(shared_load(shared + C::kTokenScaleOffset + 4 * row));
        factors.store(sum[u], token_scale, p.output_pointer, tile.token + row, column, p.out_features);
      }
    }
  }
}

// The end of a tile whose inputs are shared by the warpgroups or warps of a block, and perhaps by those of a cluster,
// or whose sums go to scratch. `hand_over()`: what the threads do before they meet for the last time.
template <class C, class HandOver>
__device__ __forceinline__ void finish_partial(const Parameters& p, uint32_t shared, const WorkTile& tile,
                                               const HandOver& hand_over, int cluster_size, int block_rank,
                                               int warpgroup, int warp, int lane,
                                               const int32_t (&sums)[C::kBlocks][C::kTokens / 2]) {
  const bool exchanges = C::kDepthSplit && cluster_size > 1;
  if constexpr (C::kSumsApart) {
    __syncwarp();
    if (exchanges) cluster_arrive();
    add_sums_of_ring<C>(shared + C::kSumOffset, warp, lane, sums);
  } else {
    named_barrier_sync(kPartialSums, C::kConsumerThreads);  // all warpgroups are done with the stages
    if (exchanges) cluster_arrive();
    store_partial<C>(shared + C::kPartialOffset, warpgroup, warp, lane, sums);
  }
  hand_over();
  named_barrier_sync(kPartialSums, C::kConsumerThreads);
  if (exchanges) cluster_wait();  // the cluster's blocks are done with theirs
  reduce_tile<C>(p, shared, tile, C::kDepthSplit ? block_rank : 0, threadIdx.x);
}

}  // namespace marlin_qqq::cuda::sm90
