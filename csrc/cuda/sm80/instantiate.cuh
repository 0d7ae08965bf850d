// Compiles the kernels of one tile, both scale modes.
#pragma once

#include "cuda/sm80/kernel.cuh"
#include "cuda/sm80/registry.h"

namespace marlin_qqq::cuda::sm80 {

template <int kTileIndex, bool kGrouped>
Kernel kernel_of() {
  static_assert(kTileIndex >= 0, "no such tile in plan/sm80_tiles.h");
  return gemm_kernel<Config<kTileIndex, kGrouped>>;
}

}  // namespace marlin_qqq::cuda::sm80

#define MARLIN_QQQ_INSTANTIATE_SM80(name)                                              \
  template marlin_qqq::cuda::sm80::Kernel                                              \
  marlin_qqq::cuda::sm80::kernel_of<marlin_qqq::plan::sm80_tile_index(name), false>(); \
  template marlin_qqq::cuda::sm80::Kernel                                              \
  marlin_qqq::cuda::sm80::kernel_of<marlin_qqq::plan::sm80_tile_index(name), true>();
