// Asking for memory ahead of its use.
#pragma once

namespace marlin_qqq::cuda {

// Brings what lies at `address` in global memory to L2. A kernel that waits for the one before it may do so before the
// wait, for memory that the other one writes, too: that is where it writes it. (Earlier GPUs start no kernel early.)
__device__ __forceinline__ void prefetch_to_l2(const void* address) {
#if __CUDA_ARCH__ >= 900
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(address)));
#endif
}

}  // namespace marlin_qqq::cuda
