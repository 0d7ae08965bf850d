// Blocks that run together and see one another's shared memory (PTX ISA, "barrier.cluster", "mapa").
#pragma once

#include <cstdint>

namespace marlin_qqq::cuda {

__device__ __forceinline__ uint32_t cluster_block_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Says that this thread has got this far. Without a fence: what others may rely on is that barriers are initialised
// (barrier_init_fence) and that this thread has read what it wanted of shared memory.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
// With a fence of all memory: also that what this thread did to other blocks' shared memory has been done.
__device__ __forceinline__ void cluster_arrive_release() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// The address, in the cluster's window, of `address` in the shared memory of block `rank`.
__device__ __forceinline__ uint32_t cluster_address(uint32_t address, uint32_t rank) {
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  return remote;
}

// Four words -> `target`, which may be in another block, as is `barrier`; they count as 16 bytes that the barrier's
// phase expects. The writer waits for nothing (PTX ISA, "st.async").
__device__ __forceinline__ void cluster_store_async(uint32_t target, const int4& value, uint32_t barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.s32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(target),
      "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(barrier)
      : "memory");
}

}  // namespace marlin_qqq::cuda
