// The compiled mma.sync kernels, one a row of plan::kSm80Tiles and scale mode.
#pragma once

#include "cuda/sm80/config.cuh"

namespace marlin_qqq::cuda::sm80 {

using Kernel = void (*)(const Parameters);

// Defined by the files of instantiations/.
template <int kTileIndex, bool kGrouped>
Kernel kernel_of();

}  // namespace marlin_qqq::cuda::sm80
