// Host side of the mma.sync kernel.
#pragma once

#include "cuda/gemm.h"

namespace marlin_qqq::cuda::sm80 {

cudaError_t launch(const plan::Plan& plan, const plan::Problem& problem, const GemmArguments& arguments, void* scratch,
                   cudaStream_t stream);

}  // namespace marlin_qqq::cuda::sm80
