// From exact int32 sums to output, of tiles whose warpgroups have all of the inputs: from registers through shared
// memory to TMA, those that a cluster shares after an exchange of sums (exchange.cuh). Where rings share the inputs,
// see ring_sums.cuh. No counter or lock exists.
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

}  // namespace marlin_qqq::cuda::sm90
