// The compiled Hopper kernels: of every row of plan::kSm90Tiles the scale modes and variants that there are.
#pragma once

#include "cuda/sm90/config.cuh"

namespace marlin_qqq::cuda::sm90 {

using Kernel = void (*)(const Parameters);

constexpr bool kernel_exists(const plan::Sm90Tile& tile, bool grouped, Variant variant) {
  switch (variant) {
    case Variant::kPlain:
      return !grouped || tile.takes_group_scales();
    case Variant::kAhead:
      return tile.stages_ahead(grouped) > 0;
    case Variant::kQuantizing:
      return tile.can_quantize();
  }
  return false;
}

// Defined by the files of instantiations/.
template <int kTileIndex, bool kGrouped, Variant kVariant>
Kernel kernel_of();

}  // namespace marlin_qqq::cuda::sm90
