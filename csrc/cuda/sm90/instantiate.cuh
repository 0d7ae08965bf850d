// Compiles the kernels of one tile.
#pragma once

#include "cuda/sm90/flow_kernel.cuh"
#include "cuda/sm90/kernel.cuh"
#include "cuda/sm90/registry.h"

namespace marlin_qqq::cuda::sm90 {

template <int kTileIndex, bool kGrouped, Variant kVariant>
Kernel kernel_of() {
  static_assert(kTileIndex >= 0, "no such tile in plan/sm90_tiles.h");
  static_assert(kernel_exists(plan::kSm90Tiles[kTileIndex], kGrouped, kVariant), "no such variant: see registry.h");
  using C = Config<kTileIndex, kGrouped, kVariant>;
  if constexpr (C::kFlows) {
    return flow_kernel<C>;
  } else {
    return gemm_kernel<C>;
  }
}

}  // namespace marlin_qqq::cuda::sm90

#define MARLIN_QQQ_INSTANTIATE_SM90_VARIANT(name, grouped, variant)          \
  template marlin_qqq::cuda::sm90::Kernel marlin_qqq::cuda::sm90::kernel_of< \
      marlin_qqq::plan::sm90_tile_index(name), grouped, marlin_qqq::cuda::sm90::Variant::variant>();

#define MARLIN_QQQ_INSTANTIATE_SM90_PER_CHANNEL(name) MARLIN_QQQ_INSTANTIATE_SM90_VARIANT(name, false, kPlain)

// Both scale modes.
#define MARLIN_QQQ_INSTANTIATE_SM90(name)       \
  MARLIN_QQQ_INSTANTIATE_SM90_PER_CHANNEL(name) \
  MARLIN_QQQ_INSTANTIATE_SM90_VARIANT(name, true, kPlain)
