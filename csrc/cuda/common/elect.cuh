// One thread for a warp.
#pragma once

#include <cstdint>

namespace marlin_qqq::cuda {

// True in one thread, always the same one, of a warp that is here together (PTX ISA, "elect.sync"). Where a copy stands
// directly behind it, ptxas knows that a single thread is active and issues the copy as it stands; behind any other
// condition it writes a loop over the active threads.
__device__ __forceinline__ bool elect_thread() {
  uint32_t elected;
  asm volatile(
      "{\n.reg .pred elected;\n"
      "elect.sync _|elected, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, elected;\n}\n"
      : "=r"(elected));
  return elected != 0;
}

}  // namespace marlin_qqq::cuda
