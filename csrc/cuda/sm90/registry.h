// The compiled Hopper kernels, one a row of plan::kSm90Tiles and scale mode.
#pragma once

#include "cuda/sm90/config.cuh"

namespace marlin_qqq::cuda::sm90 {

using Kernel = void (*)(const Parameters);

// Defined by the files of instantiations/.
template <int kTileIndex, bool kGrouped>
Kernel kernel_of();

// The one that quantises the activations itself, of a tile that can (plan::Sm90Tile::can_quantize).
template <int kTileIndex, bool kGrouped>
Kernel quantizing_kernel_of();

}  // namespace marlin_qqq::cuda::sm90
