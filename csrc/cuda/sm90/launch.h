// Host side of the Hopper kernel.
#pragma once

#include "cuda/gemm.h"

namespace marlin_qqq::cuda::sm90 {

cudaError_t launch(const plan::Plan& plan, const plan::Problem& problem, const GemmArguments& arguments, void* scratch,
                   cudaStream_t stream);

// How many clusters of `cluster_size` blocks, each of which fills a multiprocessor, the current device runs at once.
cudaError_t max_active_clusters(int cluster_size, int* clusters);

}  // namespace marlin_qqq::cuda::sm90
