// Host side of the Hopper kernel.
#pragma once

#include "cuda/gemm.h"

namespace marlin_qqq::cuda::sm90 {

cudaError_t launch(const plan::Plan& plan, const plan::Problem& problem, const GemmArguments& arguments, void* scratch,
                   cudaStream_t stream);

// Clusters of `cluster_size` blocks of the table's largest tile that the current device runs at once.
int max_active_clusters(int cluster_size);

}  // namespace marlin_qqq::cuda::sm90
