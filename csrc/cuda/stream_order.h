// Whether a launch overlaps with the kernels around it, as far as the host can know.
//
// Kernels of this library let the next one start early, and wait for the one before by themselves
// (dependent_launch.cuh). In a row of them a launch's first weights arrive while the one before ends, and a grid that
// leaves multiprocessors to its neighbour is the fastest. Between kernels that do neither, as norms and attention
// mostly are, a launch has the device to itself, and another plan is the fastest (plan::Problem::standalone). While a
// CUDA graph is captured, which is how models are served, the stream tells what comes before; otherwise nothing does.
#pragma once

#include <cuda_runtime_api.h>

namespace marlin_qqq::cuda {

// Before a launch: whether `stream` is being captured and what comes before is not one of our launches, or is a
// quantisation of activations that itself comes after none. False where that is not known.
bool stands_alone(cudaStream_t stream);

// After a launch of ours on `stream`. `standalone`: what the next launch is, of which this one is a part.
void remember_launch(cudaStream_t stream, bool standalone);

}  // namespace marlin_qqq::cuda
