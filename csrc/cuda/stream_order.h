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

// A stream as it is when one call of an op begins: LaunchOrder (launch_order.h) by what the stream says. Outside of a
// capture it is asked once a call, however many launches that makes.
class StreamOrder {
 public:
  explicit StreamOrder(cudaStream_t stream);

  cudaStream_t stream() const { return stream_; }
  // LaunchOrder::stands_alone of the call's first launch.
  bool stands_alone() const { return stands_alone_; }
  // LaunchOrder::remember, after every launch.
  void remember_launch(bool next_stands_alone) const;

 private:
  cudaStream_t stream_;
  bool captured_;
  bool stands_alone_;
};

}  // namespace marlin_qqq::cuda
