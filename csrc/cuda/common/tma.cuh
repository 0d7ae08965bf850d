// The Tensor Memory Accelerator, TMA (PTX ISA, "Data Movement and Conversion Instructions: Tensor copy"). A coordinate
// outside the tensor reads as zero and is not written, so edges need no code.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace marlin_qqq::cuda {

// Cache hints (createpolicy encodings that CUTLASS and Triton use as constants too).
constexpr uint64_t kEvictNormal = 0x1000000000000000ull;
constexpr uint64_t kEvictFirst = 0x12f0000000000000ull;

// Box at (column, row) -> shared memory; its bytes complete on `barrier`.
__device__ __forceinline__ void tma_load(const CUtensorMap* map, uint32_t target, uint32_t barrier, int32_t column,
                                         int32_t row, uint64_t hint) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(target),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "l"(hint)
      : "memory");
}

// As tma_load, to the same place in every block of the cluster whose bit is set in `blocks`; each block's own barrier
// counts the bytes that it receives.
__device__ __forceinline__ void tma_load_multicast(const CUtensorMap* map, uint32_t target, uint32_t barrier,
                                                   int32_t column, int32_t row, uint16_t blocks, uint64_t hint) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint"
      " [%0], [%1, {%3, %4}], [%2], %5, %6;" ::"r"(target),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "h"(blocks), "l"(hint)
      : "memory");
}

// Box at (column, row) -> L2. Harmless whatever another kernel may be writing: L2 is where all see the same bytes.
__device__ __forceinline__ void tma_prefetch(const CUtensorMap* map, int32_t column, int32_t row) {
  asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global [%0, {%1, %2}];" ::"l"(map), "r"(column), "r"(row)
               : "memory");
}

// Fetches the description itself, which the first copy would otherwise wait for.
__device__ __forceinline__ void tma_prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Shared memory -> box at (column, row); completes with the thread's bulk group.
__device__ __forceinline__ void tma_store(const CUtensorMap* map, uint32_t source, int32_t column, int32_t row) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map), "r"(source),
               "r"(column), "r"(row)
               : "memory");
}
__device__ __forceinline__ void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's stores still read shared memory.
template <int kPending>
__device__ __forceinline__ void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
__device__ __forceinline__ void tma_store_wait_all() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Orders this thread's ordinary writes to shared memory before later reads by TMA or the tensor cores.
__device__ __forceinline__ void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

}  // namespace marlin_qqq::cuda
