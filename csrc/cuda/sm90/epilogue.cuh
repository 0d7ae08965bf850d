// From exact int32 sums to output: tiles go from registers through shared memory to TMA, those that a
// cluster shares after an exchange of sums (exchange.cuh); what the rings of a block add up to goes from shared memory.
// No counter or lock exists.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "cuda/common/barrier.cuh"
#include "cuda/common/cluster.cuh"
#include "cuda/common/output.cuh"
#include "cuda/common/shared_memory.cuh"
#include "cuda/common/tma.cuh"
#include "cuda/sm90/config.cuh"
#include "cuda/sm90/copies.cuh"
#include "cuda/sm90/exchange.cuh"

namespace marlin_qqq::cuda::sm90 {

// Transposes an 8x8 block of 16-bit elements over the warp: lane l holds elements 2 * (l % 4) and the next of row l /
// 4, before and after. PTX ISA, movmatrix.
__device__ __forceinline__ uint32_t transposed(uint32_t block) {
  uint32_t result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(block));
  return result;
}

// Channel scales and biases of the features of a thread's sums, fetched before the products so that nothing waits for
// them after, from L2 (see ColumnFactors). No bias is -0 (0x8000 in both output types): adding it changes no value,
// zeros of either sign included.
template <class C>
struct FeatureFactors {
  float channel_scale[C::kBlocks][2];
  uint32_t bias[C::kBlocks][2];  // bits

  __device__ __forceinline__ void load(const Parameters& p, int feature, int warp, int lane) {
#pragma unroll
    for (int j = 0; j < C::kBlocks; ++j) {
#pragma unroll
      for (int b = 0; b < 2; ++b) {
        // Features beyond the last, which are not stored, get the last one's.
        const int column =
            min(feature + chunk_feature<C::kBlocks>(warp, lane / 8) + 16 * j + 8 * b + lane / 4, p.out_features - 1);
        channel_scale[j][b] =
            __ldcg(p.channel_scale + format::stored_channel_scale_column(static_cast<uint32_t>(column)));
        bias[j][b] = p.bias != nullptr ? __ldcg(static_cast<const uint16_t*>(p.bias) + column) : 0x8000u;
      }
    }
  }
};

// Starts fetching a tile's token scales to shared memory, a copy for each warpgroup, by its threads; zero beyond the
// last token.
template <class C>
__device__ __forceinline__ void fetch_token_scales(const Parameters& p, uint32_t token_scales, int token, int thread) {
#pragma unroll
  for (int i = 0; i < C::kTokens; i += 128) {
    const int index = thread + i;
    if (index < C::kTokens) {
      const bool inside = token + index < p.num_tokens;
      copy_async_or_zero(token_scales + 4 * index, p.token_scale + (inside ? token + index : 0), inside);
    }
  }
}

// A chunk of a warpgroup's outputs, as the threads hold them: pairs[i][j][b] are two neighbouring features of token
// 8 * i + lane / 4 of the chunk.
template <class C>
struct OutputChunk {
  static constexpr int kOctets = C::kOctets;
  uint32_t pairs[kOctets][C::kBlocks][2];

  float2 scale[kOctets];  // of the thread's tokens

  // Where registers are scarce: kept from chunk to chunk, which the compiler would not do by itself.
  uint32_t first_scale;
  uint32_t staged[C::kBlocks][2];

  __device__ __forceinline__ OutputChunk(uint32_t token_scales, int warp, int lane) {
    if constexpr (C::kScarceRegisters) {
      first_scale = scale_address(token_scales, lane);
#pragma unroll
      for (int j = 0; j < C::kBlocks; ++j) {
#pragma unroll
        for (int b = 0; b < 2; ++b) {
          staged[j][b] = staging_offset(j, b, warp, lane);
          asm volatile("" : "+r"(staged[j][b]));
        }
      }
    }
  }

  static __device__ __forceinline__ uint32_t scale_address(uint32_t token_scales, int lane) {
    return token_scales + 4 * 2 * (lane % 4);
  }

  // Of the first octet, in a staging buffer: [panels of 64 features][tokens][64], swizzled as TMA reads it.
  static __device__ __forceinline__ uint32_t staging_offset(int j, int b, int warp, int lane) {
    const int row = lane / 4;
    const int column = chunk_feature<C::kBlocks>(warp, lane % 4) + 16 * j + 8 * b;
    const uint32_t swizzled = (column % 64 / 8) ^ (row % 8);
    return column / 64 * C::kStoreTokens * 128 + row * 128 + swizzled * 16 + 4 * (lane % 4);
  }

  __device__ __forceinline__ void load_scales(int chunk, uint32_t token_scales, int lane) {
    const uint32_t first = C::kScarceRegisters ? first_scale : scale_address(token_scales, lane);
#pragma unroll
    for (int i = 0; i < kOctets; ++i) {
      if (!C::has_octet(chunk, i)) continue;
      scale[i] = shared_load_float2(first + 4 * (chunk * C::kStoreTokens + 8 * i));
    }
  }

  // From sums. All of a kind before the next kind: each conversion and transposition hides the others' latency.
  template <bool kHasBias, bool kBFloat16>
  __device__ __forceinline__ void convert(int chunk, const int32_t (&sums)[C::kBlocks][C::kTokens / 2],
                                          const FeatureFactors<C>& factors) {
#pragma unroll
    for (int i = 0; i < kOctets; ++i) {
      if (!C::has_octet(chunk, i)) continue;
#pragma unroll
      for (int j = 0; j < C::kBlocks; ++j) {
#pragma unroll
        for (int b = 0; b < 2; ++b) {
          const int index = 4 * (chunk * kOctets + i) + 2 * b;
          float low = format::scaled_sum(sums[j][index], factors.channel_scale[j][b], scale[i].x);
          float high = format::scaled_sum(sums[j][index + 1], factors.channel_scale[j][b], scale[i].y);
          if constexpr (kHasBias) {
            const float bias = bias_value(factors.bias[j][b], kBFloat16);
            low = format::biased(low, bias);
            high = format::biased(high, bias);
          }
          pairs[i][j][b] = pack_outputs(low, high, kBFloat16);
        }
      }
    }
    // A thread has two tokens of one feature: after the transposition, two features of one token.
#pragma unroll
    for (int i = 0; i < kOctets; ++i) {
      if (!C::has_octet(chunk, i)) continue;
#pragma unroll
      for (int j = 0; j < C::kBlocks; ++j) {
#pragma unroll
        for (int b = 0; b < 2; ++b) pairs[i][j][b] = transposed(pairs[i][j][b]);
      }
    }
  }

  // -> a staging buffer.
  __device__ __forceinline__ void stage(int chunk, uint32_t buffer, int warp, int lane) const {
#pragma unroll
    for (int i = 0; i < kOctets; ++i) {
      if (!C::has_octet(chunk, i)) continue;
#pragma unroll
      for (int j = 0; j < C::kBlocks; ++j) {
#pragma unroll
        for (int b = 0; b < 2; ++b) {
          const uint32_t offset = C::kScarceRegisters ? staged[j][b] : staging_offset(j, b, warp, lane);
          asm volatile("st.shared.b32 [%0], %1;" ::"r"(buffer + offset + 8 * i * 128), "r"(pairs[i][j][b]) : "memory");
        }
      }
    }
  }
};

// This block's chunks of a tile (all, unless sums are exchanged), this warpgroup's features. Called by its 128 threads,
// which have started to fetch its token scales.
template <class C, bool kHasBias, bool kBFloat16, bool kExchanged>
__device__ __forceinline__ void store_tile(const Parameters& p, uint32_t staging, uint32_t token_scales,
                                           const FeatureFactors<C>& factors, const WorkTile& tile, int feature,
                                           int warpgroup, int warp, int thread,
                                           int32_t (&sums)[C::kBlocks][C::kTokens / 2]) {
  const int lane = thread % 32;
  constexpr int kBuffers = C::kStoreBuffers;
  // Chunks that go to TMA together: each time, the threads wait for their writes to shared memory.
  constexpr int kGroup = kExchanged || kBuffers % 2 != 0 ? 1 : 2;
  constexpr int kGroups = kBuffers / kGroup;
  const bool leader = thread % 128 == 0;
  const uint32_t warpgroup_staging = staging + warpgroup * kBuffers * C::kChunkBytes;

  copy_async_wait_all();
  if (leader) tma_store_wait_read<0>();
  named_barrier_sync(kStagingFree + warpgroup, 128);  // all threads' token scales are there, and all buffers are free
  // Chunks are sent some ahead of those that are finished: the network between the blocks and the arithmetic work at
  // the same time.
  constexpr int kAhead = C::kChunks < 4 ? C::kChunks : 4;
  // Not set up where there is none: its divisions would stand between a block's tiles.
  const std::conditional_t<kExchanged, Exchange<C>, NoExchange> exchange(p, staging, tile, thread);
  typename Exchange<C>::Turn turn;
  typename Exchange<C>::Turn turn_ahead;
  if constexpr (kExchanged) {
#pragma unroll
    for (int chunk = 0; chunk < kAhead; ++chunk) {
      exchange.send(chunk, turn_ahead, sums);
      turn_ahead.next(exchange.split);
    }
  }
  OutputChunk<C> output(token_scales, warp, lane);
  if constexpr (!kExchanged) {
    output.load_scales(0, token_scales, lane);
    output.template convert<kHasBias, kBFloat16>(0, sums, factors);
    if (C::kChunks > 1) output.load_scales(1, token_scales, lane);
  }
#pragma unroll
  for (int chunk = 0; chunk < C::kChunks; ++chunk) {
    int place = chunk;  // among this block's chunks
    if constexpr (kExchanged) {
      if (chunk + kAhead < C::kChunks) {
        exchange.send(chunk + kAhead, turn_ahead, sums);
        turn_ahead.next(exchange.split);
      }
      place = turn.place;
      const bool own = chunk < exchange.chunks && turn.owner == exchange.rank;
      turn.next(exchange.split);
      if (!own) continue;
      output.load_scales(chunk, token_scales, lane);
      exchange.receive(chunk, place, sums);
      output.template convert<kHasBias, kBFloat16>(chunk, sums, factors);
    }
    // The store that last read this buffer was kGroups groups ago.
    if (place >= kBuffers && place % kGroup == 0) {
      if (leader) tma_store_wait_read<kGroups - 1>();
      named_barrier_sync(kStagingFree + warpgroup, 128);
    }
    output.stage(chunk, warpgroup_staging + place % kBuffers * C::kChunkBytes, warp, lane);
    // The next chunk is converted while this one is on its way to shared memory.
    if (!kExchanged && chunk + 1 < C::kChunks) {
      output.template convert<kHasBias, kBFloat16>(chunk + 1, sums, factors);
      if (chunk + 2 < C::kChunks) output.load_scales(chunk + 2, token_scales, lane);
    }
    if (place % kGroup != kGroup - 1 && chunk + 1 < C::kChunks) continue;
    // The first warp hands the group to TMA when all have written it; the others go on.
    async_proxy_fence();
    const int written = kChunksWritten + warpgroup * kGroups + place / kGroup % kGroups;
    if (warp == 0) {
      named_barrier_sync(written, 128);
    } else {
      named_barrier_arrive(written, 128);
    }
    if (leader) {
#pragma unroll
      for (int back = place % kGroup; back >= 0; --back) {
        const int row = tile.token + (chunk - back) * C::kStoreTokens;
        const uint32_t source = warpgroup_staging + (place - back) % kBuffers * C::kChunkBytes;
#pragma unroll
        for (int panel = 0; panel < C::kBlocks; ++panel) {
#pragma unroll
          for (int part = 0; part < C::kStoreTokens; part += C::kStoreRows) {
            if (!C::has_octet(chunk - back, part / 8)) continue;
            tma_store(&p.output, source + (panel * C::kStoreTokens + part) * 128, feature + 64 * panel, row + part);
          }
        }
      }
      tma_store_commit();
    }
  }
}

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

// A warpgroup's partial sums -> shared memory, [token][feature] with a pitch that spreads the banks.
template <class C>
__device__ __forceinline__ void store_partial(uint32_t partial, int warpgroup, int warp, int lane,
                                              const int32_t (&sums)[C::kBlocks][C::kTokens / 2]) {
  static_assert(!C::kWarpRings, "there is room for the sums of warps beside their rings");
  constexpr int kPitch = C::kPartialPitch;
  const int copy = C::kDepthSplit ? warpgroup : 0;
  const int first_feature = warpgroup * C::kFeatureStride;
#pragma unroll
  for (int j = 0; j < C::kBlocks; ++j) {
#pragma unroll
    for (int i = 0; i < C::kTokens / 8; ++i) {
#pragma unroll
      for (int b = 0; b < 2; ++b) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int token = 8 * i + 2 * (lane % 4) + e;
          const int chunk = chunk_feature<C::kBlocks>(warp, lane / 8);
          const int feature = first_feature + chunk + 16 * j + 8 * b + lane / 4;
          asm volatile("st.shared.s32 [%0], %1;" ::"r"(partial + 4 * ((copy * C::kTokens + token) * kPitch + feature)),
                       "r"(sums[j][4 * i + 2 * b + e])
                       : "memory");
        }
      }
    }
  }
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
#pragma unroll
  for (int j = 0; j < C::kBlocks; ++j) {
#pragma unroll
    for (int i = 0; i < C::kTokens / 8; ++i) {
#pragma unroll
      for (int b = 0; b < 2; ++b) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          shared_add(first + 4 * ((8 * i + e) * C::kPartialPitch + 16 * j + 8 * b), sums[j][4 * i + 2 * b + e]);
        }
      }
    }
  }
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

}  // namespace marlin_qqq::cuda::sm90
