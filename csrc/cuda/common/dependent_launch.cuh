// Programmatic dependent launch (PTX ISA, griddepcontrol; CUDA C++ Programming Guide, "Programmatic Dependent Launch
// and Synchronization"): a kernel starts while the one before it in the stream drains.
//
// Every kernel of ours waits in every block before it reads what the kernel before may have written, or writes
// anything: so a kernel completes only after all kernels before it, and one wait orders a whole chain.
#pragma once

namespace marlin_qqq::cuda {

// Returns once the kernels before this one have completed and their writes can be seen.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel of the stream start as soon as every block has said so and there is room for it.
__device__ __forceinline__ void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace marlin_qqq::cuda
