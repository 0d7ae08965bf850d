// Adding the sums of a cluster's blocks that share a tile's inputs. The blocks take turns at the chunks of the
// epilogue's tokens; every block sends the others' chunks straight from its registers into their shared memory and
// keeps its own, so that only what has to travel does, and nobody waits for a load from another block.
#pragma once

#include "cuda/common/barrier.cuh"
#include "cuda/common/cluster.cuh"
#include "cuda/common/shared_memory.cuh"
#include "cuda/sm90/copies.cuh"

namespace marlin_qqq::cuda::sm90 {

template <class C>
struct Exchange {
  static constexpr int kOctets = C::kOctets;
  // A chunk from one block: 16 bytes a thread for every octet of tokens and product.
  static constexpr int kVectorBytes = 16 * C::kTileThreads;
  static constexpr int kChunkBytes = kOctets * C::kBlocks * kVectorBytes;

  int split;       // blocks that share the tile
  int rank;        // of this one among them
  int first_rank;  // theirs in the cluster: first_rank + i * rank_stride
  int rank_stride;
  int chunks;         // of the tile that hold tokens: chunk i is for block i % split to finish
  int block_chunks;   // that a block finishes at most
  uint32_t received;  // [split - 1][block_chunks] chunks from the others, over the stages
  uint32_t barriers;  // one for each of the block's chunks
  int thread;         // among those that multiply the tile

  __device__ __forceinline__ Exchange(const Parameters& p, uint32_t shared, const WorkTile& tile, int thread)
      : split(p.split),
        rank(static_cast<int>(cluster_block_rank()) / p.multicast),
        first_rank(static_cast<int>(cluster_block_rank()) - rank * p.multicast),
        rank_stride(p.multicast),
        chunks(min(C::kChunks, (p.num_tokens - tile.token + C::kStoreTokens - 1) / C::kStoreTokens)),
        block_chunks((chunks + split - 1) / split),
        received(shared + C::kRingOffset),
        barriers(shared + C::kExchangeBarrierOffset),
        thread(thread % C::kTileThreads) {}

  // Whose a chunk is, and which of that block's: counted along with the chunks, without divisions.
  struct Turn {
    int owner = 0;
    int place = 0;
    __device__ __forceinline__ void next(int split) {
      if (++owner == split) {
        owner = 0;
        ++place;
      }
    }
  };

  // What a block sends of a chunk: the last one may be half of one.
  static __device__ __forceinline__ int chunk_bytes(int chunk) {
    const bool half = C::kTokens % C::kStoreTokens != 0 && chunk == C::kChunks - 1;
    return half ? kChunkBytes / 2 : kChunkBytes;
  }

  // In one thread, before anything is sent.
  __device__ __forceinline__ void expect() const {
    for (int i = 0; i * split + rank < chunks; ++i) {
      barrier_arrive_expect(barriers + 8 * i, (split - 1) * chunk_bytes(i * split + rank));
    }
  }

  // Sends a chunk to its owner, which must be done with its stages, unless it is this block's.
  __device__ __forceinline__ void send(int chunk, const Turn& turn,
                                       const int32_t (&sums)[C::kBlocks][C::kTokens / 2]) const {
    if (chunk >= chunks || turn.owner == rank) return;
    const int block = first_rank + turn.owner * rank_stride;
    const int sender = rank - (rank > turn.owner);
    const uint32_t target =
        cluster_address(received + (sender * block_chunks + turn.place) * kChunkBytes + 16 * thread, block);
    const uint32_t barrier = cluster_address(barriers + 8 * turn.place, block);
#pragma unroll
    for (int i = 0; i < kOctets; ++i) {
      if (!C::has_octet(chunk, i)) continue;
#pragma unroll
      for (int j = 0; j < C::kBlocks; ++j) {
        const int32_t* sum = &sums[j][4 * (chunk * kOctets + i)];
        cluster_store_async(target + (i * C::kBlocks + j) * kVectorBytes, {sum[0], sum[1], sum[2], sum[3]}, barrier);
      }
    }
  }

  // Adds what the others sent of one of this block's own chunks.
  __device__ __forceinline__ void receive(int chunk, int place, int32_t (&sums)[C::kBlocks][C::kTokens / 2]) const {
    barrier_wait(barriers + 8 * place, 0);
#pragma unroll 1
    for (int sender = 0; sender < split - 1; ++sender) {
      const uint32_t source = received + (sender * block_chunks + place) * kChunkBytes + 16 * thread;
#pragma unroll
      for (int i = 0; i < kOctets; ++i) {
        if (!C::has_octet(chunk, i)) continue;
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

// Of a tile that no cluster shares.
struct NoExchange {
  __device__ __forceinline__ NoExchange(const Parameters&, uint32_t, const WorkTile&, int) {}
};

}  // namespace marlin_qqq::cuda::sm90
