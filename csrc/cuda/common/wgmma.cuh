// Ordering and operands of warpgroup matrix products (PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions").
#pragma once

#include <cstdint>

#include "cuda/common/wgmma_int8.cuh"

namespace marlin_qqq::cuda {

// Before the first product, and whenever registers it reads or adds to were written by other instructions.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most kPending committed groups are unfinished.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving uses of the sums across an asynchronous product.
template <int kCount>
__device__ __forceinline__ void keep_in_place(int32_t (&sums)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(sums[i])::"memory");
}

// Descriptor of a K-major B operand of rows of 128 bytes, swizzled by 128 bytes, at a multiple of 1024 bytes (of 128,
// where it has no more than 8 rows): groups of 8 rows lie 1024 bytes apart (stride byte offset); the leading offset is
// unused. Adding 32 bytes to the address moves to the next 32 values of k. PTX ISA, "Matrix Descriptor Format".
__device__ __forceinline__ uint64_t swizzled_descriptor(uint32_t address) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kStride = uint64_t{1024 >> 4} << 32;
  constexpr uint64_t kLeading = uint64_t{1} << 16;
  return kSwizzle128 | kStride | kLeading | (address >> 4);
}
constexpr uint64_t kDescriptorStep32 = 32 >> 4;

// sums (+)= A x B as WgmmaInt8, for any number of tokens: of more than 256 as two products of the same A.
template <int kTokens>
__device__ __forceinline__ void wgmma_int8(int32_t (&sums)[kTokens / 2], const uint32_t (&a)[4], uint64_t b,
                                           int32_t accumulate) {
  if constexpr (kTokens <= 256) {
    WgmmaInt8<kTokens>::issue(sums, a, b, accumulate);
  } else {
    constexpr int kFirst = (kTokens / 2 + 15) / 16 * 16;
    constexpr int kSecond = kTokens - kFirst;
    WgmmaInt8<kFirst>::issue(reinterpret_cast<int32_t(&)[kFirst / 2]>(sums), a, b, accumulate);
    WgmmaInt8<kSecond>::issue(reinterpret_cast<int32_t(&)[kSecond / 2]>(sums[kFirst / 2]), a, b + kFirst * 128 / 16,
                              accumulate);
  }
}

// The registers of a warpgroup's threads (PTX ISA, setmaxnreg): taken from or given to the block's pool.
template <int kCount>
__device__ __forceinline__ void registers_increase() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void registers_decrease() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

}  // namespace marlin_qqq::cuda
