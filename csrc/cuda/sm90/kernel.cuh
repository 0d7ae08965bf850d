// The Hopper kernel: D[features, tokens] = W[features, inputs] x A^T[inputs, tokens] by wgmma, with the weights
// dequantised into registers (the A operand) and the activations in shared memory (the B operand).
#pragma once

#include "cuda/sm90/config.cuh"
#include "cuda/sm90/epilogue.cuh"
#include "cuda/sm90/mainloop.cuh"

namespace marlin_qqq::cuda::sm90 {

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocksPerSm)
    gemm_kernel(const __grid_constant__ Parameters p) {
  extern __shared__ uint8_t dynamic_shared_memory[];
  const SharedMemory<C> shared{(shared_address(dynamic_shared_memory) + 1023) & ~1023u};
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  const int lane = threadIdx.x % 32;
  const int cluster_size = p.split * p.multicast;
  const int block_rank = cluster_size > 1 ? static_cast<int>(cluster_block_rank()) : 0;

  // The next kernel may start once all blocks of this one have: it waits for our results itself.
  allow_next_kernel();

  // Barriers
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < C::kStages; ++stage) {
      barrier_init(shared.full(stage), 1);
      barrier_init(shared.empty(stage), C::kConsumerWarps * p.multicast);
    }
    barrier_init_fence();
  }
  if (p.multicast > 1) {
    cluster_arrive();
    cluster_wait();
  } else {
    __syncthreads();
  }

  // Tiles: whole tiles are walked by a persistent grid; a tile that is split over a cluster or over the warpgroups is
  // the only one of its block, because the partial sums take the place of the stages.
  const bool partial = C::kDepthSplit || p.split > 1;
  const int clusters = gridDim.x / cluster_size;
  const int works = p.token_tiles * p.feature_groups;
  const auto tile_walk = [&] {
    return [&, work = static_cast<int>(blockIdx.x) / cluster_size](WorkTile& tile) mutable {
      if (work >= works) return false;
      tile = work_tile(p, work, block_rank, C::kTokens, C::kFeatures);
      work += partial ? works : clusters;
      return true;
    };
  };

  if (warp >= C::kConsumerWarps) {
    // Producer
    if constexpr (C::kWholeSm) registers_decrease<40>();
    if (warp == C::kConsumerWarps && lane == 0) produce<C>(p, shared, block_rank, tile_walk());
    __syncwarp();
    if (cluster_size > 1) {
      if (partial) {
        cluster_arrive();
        cluster_wait();
      }
      cluster_arrive();
      cluster_wait();
    }
  } else {
    // Consumers
    if constexpr (C::kWholeSm) registers_increase<232>();
    const int warpgroup = warp / 4;
    const uint32_t multicast_first = block_rank - block_rank % p.multicast;
    const WeightReader<C> reader(warpgroup, warp % 4, lane);
    RingPosition<C> ring;
    auto next_tile = tile_walk();
    WorkTile tile;
    int32_t sums[C::kBlocks][C::kTokens / 2];
    wait_for_previous_kernel();
    if (partial) {
      next_tile(tile);
      consume<C>(p, shared, ring, tile, reader, warpgroup, lane, multicast_first, sums);
      named_barrier_sync(3, 256);  // both warpgroups are done with the stages
      store_partial<C>(shared.base + C::kPartialOffset, warpgroup, warp % 4, lane, sums);
      if (cluster_size > 1) {
        cluster_arrive();
        cluster_wait();
      } else {
        named_barrier_sync(3, 256);
      }
      reduce_tile<C>(p, shared.base + C::kPartialOffset, tile.token, tile.feature, block_rank, threadIdx.x);
    } else if constexpr (!C::kDepthSplit) {
      float* token_scales = reinterpret_cast<float*>(__cvta_shared_to_generic(shared.base + C::kTokenScaleOffset)) + 256 * warpgroup;
      while (next_tile(tile)) {
        for (int i = threadIdx.x % 128; i < C::kTokens; i += 128) {
          token_scales[i] = tile.token + i < p.num_tokens ? p.token_scale[tile.token + i] : 0.0f;
        }
        consume<C>(p, shared, ring, tile, reader, warpgroup, lane, multicast_first, sums);
        store_tile<C>(p, shared.base, token_scales, tile.token, tile.feature + warpgroup * C::kWarpgroupFeatures,
                      warpgroup, warp % 4, lane, sums);
      }
      if (threadIdx.x % 128 == 0) tma_store_wait_all();
    }
    // No block leaves while another may still write into its shared memory or read from it.
    if (cluster_size > 1) {
      cluster_arrive();
      cluster_wait();
    }
  }
}

}  // namespace marlin_qqq::cuda::sm90
