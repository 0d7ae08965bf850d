// Adding the sums of a cluster's blocks that share a tile's inputs. The tile's tokens are shared out in chunks of the
// epilogue; every block sends the chunks of the others straight from its registers into their shared memory and keeps
// its own, so that only what has to travel does, and nobody waits for a load from another block.
#pragma once

#include "cuda/common/barrier.cuh"
#include "cuda/common/cluster.cuh"
#include "cuda/common/shared_memory.cuh"
#include "cuda/sm90/copies.cuh"

namespace marlin_qqq::cuda::sm90 {

template <class C>
struct Exchange {
  static constexpr int kOctets = C::kStoreTokens / 8;
  // A chunk from one block: 16 bytes a thread for every octet of tokens and product.
  static constexpr int kVectorBytes = 16 * C::kConsumerThreads;
  static constexpr int kChunkBytes = kOctets * C::kBlocks * kVectorBytes;

  int split;       // blocks that share the tile
  int rank;        // of this one among them
  int first_rank;  // theirs in the cluster: first_rank + i * rank_stride
  int rank_stride;
  int chunks;         // of the tile that hold tokens
  int block_chunks;   // that a block finishes; the last one may have fewer or none
  uint32_t received;  // [split - 1][block_chunks] chunks from the others, over the stages
  uint32_t barriers;  // one for each of the block's chunks

  __device__ __forceinline__ Exchange(const Parameters& p, uint32_t shared, const WorkTile& tile)
      : split(p.split),
        rank(static_cast<int>(cluster_block_rank()) / p.multicast),
        first_rank(static_cast<int>(cluster_block_rank()) - rank * p.multicast),
        rank_stride(p.multicast),
        chunks(min(C::kChunks, (p.num_tokens - tile.token + C::kStoreTokens - 1) / C::kStoreTokens)),
        block_chunks((chunks + split - 1) / split),
        received(shared + C::kRingOffset),
        barriers(shared + C::kExchangeBarrierOffset) {}

  __device__ __forceinline__ bool owns(int chunk) const {
    return chunk >= rank * block_chunks && chunk < min((rank + 1) * block_chunks, chunks);
  }

  // In one thread, before anything is sent.
  __device__ __forceinline__ void expect() const {
    const int count = min(block_chunks, chunks - rank * block_chunks);
    for (int i = 0; i < count; ++i) barrier_arrive_expect(barriers + 8 * i, (split - 1) * kChunkBytes);
  }

  // Sends the chunks of the other blocks, which must be done with their stages.
  __device__ __forceinline__ void send(const int32_t (&sums)[C::kBlocks][C::kTokens / 2]) const {
    int owner = 0;
    int place = 0;
#pragma unroll
    for (int chunk = 0; chunk < C::kChunks; ++chunk) {
      if (chunk < chunks && owner != rank) {
        const int block = first_rank + owner * rank_stride;
        const int sender = rank - (rank > owner);
        const uint32_t target = cluster_address(
            received + (sender * block_chunks + place) * kChunkBytes + 16 * static_cast<int>(threadIdx.x), block);
        const uint32_t barrier = cluster_address(barriers + 8 * place, block);
#pragma unroll
        for (int i = 0; i < kOctets; ++i) {
#pragma unroll
          for (int j = 0; j < C::kBlocks; ++j) {
            const int32_t* sum = &sums[j][4 * (chunk * kOctets + i)];
            cluster_store_async(target + (i * C::kBlocks + j) * kVectorBytes, {sum[0], sum[1], sum[2], sum[3]},
                                barrier);
          }
        }
      }
      if (++place == block_chunks) {
        place = 0;
        ++owner;
      }
    }
  }

  // Adds what the others sent of one of this block's own chunks.
  __device__ __forceinline__ void receive(int chunk, int32_t (&sums)[C::kBlocks][C::kTokens / 2]) const {
    const int place = chunk - rank * block_chunks;
    barrier_wait(barriers + 8 * place, 0);
#pragma unroll 1
    for (int sender = 0; sender < split - 1; ++sender) {
      const uint32_t source =
          received + (sender * block_chunks + place) * kChunkBytes + 16 * static_cast<int>(threadIdx.x);
#pragma unroll
      for (int i = 0; i < kOctets; ++i) {
#pragma unroll
        for (int j = 0; j < C::kBlocks; ++j) {
          const int4 part = shared_load_int4(source + (i * C::kBlocks + j) * kVectorBytes);
          int32_t* sum = &sums[j][4 * (chunk * kOctets + i)];
          sum[0] += part.x;
          sum[1] += part.y;
          sum[2] += part.z;
          sum[3] += part.w;
        }
      }
    }
  }
};

}  // namespace marlin_qqq::cuda::sm90
