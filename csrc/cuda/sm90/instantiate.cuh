// Compiles the kernels of one tile, both scale modes.
#pragma once

#include "cuda/sm90/kernel.cuh"
#include "cuda/sm90/registry.h"

namespace marlin_qqq::cuda::sm90 {

template <int kTileIndex, bool kGrouped>
Kernel kernel_of() {
  static_assert(kTileIndex >= 0, "no such tile in plan/sm90_tiles.h");
  return gemm_kernel<Config<kTileIndex, kGrouped>>;
}

template <int kTileIndex, bool kGrouped>
Kernel quantizing_kernel_of() {
  static_assert(kTileIndex >= 0 && plan::kSm90Tiles[kTileIndex].can_quantize(), "not a tile that can quantise");
  return gemm_kernel<Config<kTileIndex, kGrouped, true>>;
}

}  // namespace marlin_qqq::cuda::sm90

#define MARLIN_QQQ_INSTANTIATE_SM90(name)                                              \
  template marlin_qqq::cuda::sm90::Kernel                                              \
  marlin_qqq::cuda::sm90::kernel_of<marlin_qqq::plan::sm90_tile_index(name), false>(); \
  template marlin_qqq::cuda::sm90::Kernel                                              \
  marlin_qqq::cuda::sm90::kernel_of<marlin_qqq::plan::sm90_tile_index(name), true>();

// Of a tile that can quantise, besides.
#define MARLIN_QQQ_INSTANTIATE_SM90_QUANTIZING(name)                                              \
  template marlin_qqq::cuda::sm90::Kernel                                                         \
  marlin_qqq::cuda::sm90::quantizing_kernel_of<marlin_qqq::plan::sm90_tile_index(name), false>(); \
  template marlin_qqq::cuda::sm90::Kernel                                                         \
  marlin_qqq::cuda::sm90::quantizing_kernel_of<marlin_qqq::plan::sm90_tile_index(name), true>();
