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

// LaunchOrder (launch_order.h) by what `stream` says.
bool stands_alone(cudaStream_t stream);
void remember_launch(cudaStream_t stream, bool next_stands_alone);

}  // namespace marlin_qqq::cuda
