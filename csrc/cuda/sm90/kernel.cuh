// The Hopper kernel: D[features, tokens] = W[features, inputs] x A^T[inputs, tokens] by wgmma, with the weights
// dequantised into registers (the A operand) and the activations in shared memory (the B operand).
#pragma once

#include <type_traits>

#include "cuda/sm90/config.cuh"
#include "cuda/sm90/epilogue.cuh"
#include "cuda/sm90/mainloop.cuh"
#include "cuda/sm90/ring_sums.cuh"
#include "cuda/sm90/token_quantization.cuh"
#include "cuda/sm90/warp_mainloop.cuh"

namespace marlin_qqq::cuda::sm90 {

// The number of a thread among those that multiply. Where registers are scarce, in a form that the compiler cannot look
// through: what follows from it is then computed anew for every tile, and not kept in registers through the products.
template <class C>
__device__ __forceinline__ int thread_of_tile() {
  int thread = threadIdx.x % C::kConsumerThreads;
  if constexpr (C::kScarceRegisters) asm volatile("" : "+r"(thread));
  return thread;
}

// WorkTile::shared; where registers are scarce from what is kept anyway, at 0.1 us a launch.
template <class C>
__device__ __forceinline__ bool is_shared(const Parameters& p, const WorkTile& tile) {
  if constexpr (C::kScarceRegisters) return p.split > 1 && tile.stage_end - tile.stage_begin < p.stage_count;
  return tile.shared;
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocksPerSm) gemm_kernel(const __grid_constant__ Parameters p) {
  extern __shared__ uint8_t dynamic_shared_memory[];
  uint32_t shared = (shared_address(dynamic_shared_memory) + 1023) & ~1023u;
  asm volatile("" : "+r"(shared));  // kept, not computed anew for every stage
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  const int lane = threadIdx.x % 32;
  const int cluster_size = p.split * p.multicast;
  const int block_rank = cluster_size > 1 ? static_cast<int>(cluster_block_rank()) : 0;

  // The next kernel may start once all blocks of this one have: it waits for our results itself.
  allow_next_kernel();

  if constexpr (C::kSumsApart) clear_sums<C>(shared);
  if constexpr (!C::kDepthSplit) {
    if (threadIdx.x == 0) prepare_copies<C>(p, shared, Ring<C>::of(shared, 0), true);
    if (p.multicast > 1) {
      cluster_arrive();
      cluster_wait();
    } else {
      __syncthreads();
    }
  }

  // Tiles: a block walks over whole ones in rounds. What is left for the last round may be split over the cluster; a
  // tile that is split over a cluster or over the rings of a block is the block's last one: partial sums may take
  // the place of the stages.
  const int cluster = static_cast<int>(blockIdx.x) / cluster_size;
  const int round = static_cast<int>(gridDim.x) / p.multicast;
  const auto tile_walk = [&] {
    return [&, own = cluster * p.split + block_rank / p.multicast,
            shared_work = p.whole_works + cluster](WorkTile& tile) mutable {
      const bool whole = !C::kDepthSplit && own < p.whole_works;
      const int work = whole ? own : shared_work;
      if (work >= p.works) return false;
      tile = work_tile(p, work, whole, block_rank, C::kTokens, C::kFeatures);
      own += round;
      if (!whole) shared_work = p.works;
      return true;
    };
  };

  if (!C::kDepthSplit && warp >= C::kConsumerThreads / 32) {
    // Producer
    registers_decrease<40>();
    if (warp == C::kConsumerThreads / 32 && elect_thread()) {
      const int rank = block_rank % p.multicast;
      const auto mask = static_cast<uint16_t>(((1 << p.multicast) - 1) << (block_rank - rank));
      produce<C>(p, Ring<C>::of(shared, 0), {p.multicast, rank, p.activation_rows, mask}, tile_walk());
    }
    __syncwarp();
    if (cluster_size > 1) {
      cluster_arrive_release();
      cluster_wait();
    }
  } else {
    // Consumers
    if constexpr (!C::kDepthSplit) registers_increase<232>();
    const int warpgroup = warp / 4;
    const int ring_index = C::kWarpRings ? warp : C::kDepthSplit ? warpgroup : 0;
    auto ring = Ring<C>::of(shared, ring_index);
    auto next_tile = tile_walk();
    auto position = ring_begin<C>(p);
    WorkTile tile;
    tile.shared = false;
    int32_t sums[C::kBlocks][C::kTokens / 2];
    if constexpr (C::kDepthSplit) {
      const bool fills = C::kWarpRings || warp % 4 == 0;
      if (fills && elect_thread()) prepare_copies<C>(p, shared, ring, warp == 0);
      next_tile(tile);
      WorkTile whole = tile;
      const int stages = whole.stage_end - whole.stage_begin;
      tile.stage_begin = whole.stage_begin + stages * ring_index / C::kRings;
      tile.stage_end = whole.stage_begin + stages * (ring_index + 1) / C::kRings;
      RingFill<C> fill(p, ring, tile);
      if (fills && elect_thread()) fill.early();
      __syncthreads();  // the barriers are there for all
      // A warp of its own has no part in what the others of its warpgroup do.
      const WeightReader<C> reader(C::kWarpRings ? 0 : warpgroup, C::kWarpRings ? 0 : warp % 4, lane);
      StagesAhead<C> ahead;
      if constexpr (C::kStagesAhead > 0) {
        ahead.dequantize(ring, reader, fill, fills);
      }
      if constexpr (C::kQuantizes) {
        wait_for_previous_kernel();
        const auto quantize = [&](auto row) {
          row.load();  // ahead of the rest of the weights, which take the same way
          if (fills && elect_thread()) fill.rest({1, 0, 0, 0});
          __syncwarp();
          row.quantize(shared, whole);
        };
        if (p.x_is_bfloat16) {
          quantize(TokenRow<C, __nv_bfloat16>(p, warp, lane));
        } else {
          quantize(TokenRow<C, __half>(p, warp, lane));
        }
      } else {
        wait_for_previous_kernel();
        if (fills && elect_thread()) fill.rest({1, 0, 0, 0});
        __syncwarp();
      }
      RingFactors<C> factors(shared);
      factors.fetch(p, tile);
      if constexpr (C::kQuantizes || (C::kStagesAhead > 0 && !C::kWarpRings)) {
        // ptxas no longer knows that the warp agrees on these, and would copy with a loop over its threads.
        tile.token = __reduce_max_sync(~0u, tile.token);
        tile.feature = __reduce_max_sync(~0u, tile.feature);
        tile.stage_begin = __reduce_max_sync(~0u, tile.stage_begin);
        tile.stage_end = __reduce_max_sync(~0u, tile.stage_end);
        if constexpr (C::kStagesAhead > 0) {
          ahead.count = __reduce_max_sync(~0u, ahead.count);
          ahead.awaited = __reduce_max_sync(~0u, ahead.awaited);
        }
        if constexpr (C::kSharedAhead) ahead.in_shared = __reduce_max_sync(~0u, ahead.in_shared);
        whole.stage_begin = __reduce_max_sync(~0u, whole.stage_begin);
        ring.barriers = __reduce_max_sync(~0u, ring.barriers);
      }
      if (tile.stage_begin < tile.stage_end) {
        StageRefill<C> refill{p, ring, tile, tile.stage_begin + used_stages<C>(p), fills};
        const QuantizedTokens<C> quantized(p, shared);
        const auto rows = [&](int block, int stage) {
          if constexpr (C::kQuantizes) return quantized.row(block - whole.stage_begin, 0);
          return ring.activations(stage);
        };
        if constexpr (C::kWarpRings) {
          const int last_token = C::kQuantizes ? p.num_tokens - 1 : C::kTokens - 1;
          consume_in_warp<C>(ring, position, tile, lane, reader, ahead, rows, last_token, refill, sums);
        } else {
          const auto no_turn = [] {};
          consume<C>(ring, position, tile, reader, ahead, rows, refill, no_turn, sums);
        }
      } else {
#pragma unroll
        for (int j = 0; j < C::kBlocks; ++j) {
#pragma unroll
          for (int i = 0; i < C::kTokens / 2; ++i) sums[j][i] = 0;
        }
      }
      const auto hand_over = [&] { factors.hand_over(); };
      finish_partial<C>(p, shared, tile, hand_over, cluster_size, block_rank, warpgroup, warp % 4, lane, sums);
    } else {
      const WeightReader<C> reader(warpgroup, warp % 4, lane);
      const auto release = stage_release<C>(ring, lane, p.multicast, block_rank - block_rank % p.multicast);
      const uint32_t both_token_scales = shared + C::kTokenScaleOffset + 2 * 4 * C::kTokens * warpgroup;
      uint32_t odd_tile = 0;
      wait_for_previous_kernel();
      // Of two warpgroups that take turns, each leaves every other tile and its stages in the ring to the other.
      int other_stages = 0;
      const auto other_has_tile = [&] {
        WorkTile other;
        if (!C::kPingpong || !next_tile(other)) return false;
        other_stages = other.stage_end - other.stage_begin;
        return true;
      };
      bool waits_for_turn = C::kPingpong && warpgroup == 1;
      if (waits_for_turn && other_has_tile()) position.skip(other_stages);
      while (next_tile(tile)) {
        const bool other_follows = other_has_tile();
        const auto pass_turn = [&] {
          if (other_follows) named_barrier_arrive(kTurn + 1 - warpgroup, C::kConsumerThreads);
        };
        const int first_feature = tile.feature + warpgroup * C::kFeatureStride;
        // A warp may be one tile ahead of another, which still reads that tile's token scales.
        const uint32_t token_scales = both_token_scales + 4 * C::kTokens * odd_tile;
        odd_tile ^= 1;
        FeatureFactors<C> factors;
        const int loading_thread = thread_of_tile<C>();
        if (p.scratch_split == 1) {
          factors.load(p, first_feature, warp % 4, loading_thread % 32);
          fetch_token_scales<C>(p, token_scales, tile.token, loading_thread % 128);
        }
        if (is_shared<C>(p, tile) && threadIdx.x % C::kTileThreads == 0) Exchange<C>(p, shared, tile, 0).expect();
        if (waits_for_turn) named_barrier_sync(kTurn + warpgroup, C::kConsumerThreads);
        waits_for_turn = C::kPingpong;
        const auto rows = [&](int, int stage) { return ring.activations(stage); };
        consume<C>(ring, position, tile, reader, StagesAhead<C>(), rows, release, pass_turn, sums);
        const int thread = thread_of_tile<C>();
        if (!C::kPingpong && p.scratch_split > 1) {
          const auto nothing = [] {};
          finish_partial<C>(p, shared, tile, nothing, cluster_size, block_rank, warpgroup, warp % 4, thread % 32, sums);
        } else {
          const auto store = [&](auto kHasBias, auto kBFloat16, auto kExchanged) {
            store_tile<C, kHasBias, kBFloat16, kExchanged>(p, shared, token_scales, factors, tile, first_feature,
                                                           warpgroup, warp % 4, thread, sums);
          };
          using std::false_type, std::true_type;
          if (is_shared<C>(p, tile)) {
            // All blocks are done with their stages, and have told those that they share activations with.
            p.multicast > 1 ? cluster_arrive_release() : cluster_arrive();
            cluster_wait();
            p.output_is_bfloat16 ? store(true_type{}, true_type{}, true_type{})
                                 : store(true_type{}, false_type{}, true_type{});
          } else if (p.bias != nullptr) {
            p.output_is_bfloat16 ? store(true_type{}, true_type{}, false_type{})
                                 : store(true_type{}, false_type{}, false_type{});
          } else {
            p.output_is_bfloat16 ? store(false_type{}, true_type{}, false_type{})
                                 : store(false_type{}, false_type{}, false_type{});
          }
        }
        if (other_follows) position.skip(other_stages);
      }
      if (threadIdx.x % 128 == 0) tma_store_wait_all();
    }
    // No block leaves while another may still write into its shared memory. Blocks whose last tile was shared have met,
    // and waited for all that is written.
    if (cluster_size > 1 && !C::kDepthSplit && !is_shared<C>(p, tile)) {
      cluster_arrive_release();
      cluster_wait();
    }
  }
}

}  // namespace marlin_qqq::cuda::sm90
