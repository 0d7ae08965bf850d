#include "cuda/sm80/launch.h"

#include <array>
#include <utility>

#include "cuda/common/launch_dependent.h"
#include "cuda/common/shared_memory_limit.h"
#include "cuda/sm80/reduction.cuh"
#include "cuda/sm80/registry.h"
#include "format/divide_up.h"

namespace marlin_qqq::cuda::sm80 {
namespace {

template <int... kTileIndices>
std::array<std::array<Kernel, 2>, sizeof...(kTileIndices)> make_kernels(std::integer_sequence<int, kTileIndices...>) {
  return {{{kernel_of<kTileIndices, false>(), kernel_of<kTileIndices, true>()}...}};
}

}  // namespace

cudaError_t launch(const plan::Plan& plan, const plan::Problem& problem, const GemmArguments& arguments, void* scratch,
                   cudaStream_t stream) {
  static const auto kernels = make_kernels(std::make_integer_sequence<int, plan::kSm80TileCount>());
  static std::atomic<uint64_t> allowed[plan::kSm80TileCount][2];
  const plan::Sm80Tile& tile = plan::kSm80Tiles[plan.tile];
  const bool grouped = arguments.group_scale != nullptr;
  const Kernel kernel = kernels[plan.tile][grouped];

  Parameters p = {};
  p.activations = arguments.activations;
  p.packed_weight = arguments.packed_weight;
  p.group_scale = static_cast<const uint16_t*>(arguments.group_scale);
  p.token_scale = arguments.token_scale;
  p.channel_scale = arguments.channel_scale;
  p.bias = arguments.bias;
  p.output = arguments.output;
  p.output_is_bfloat16 = arguments.output_type == OutputType::kBFloat16;
  p.constant_weights = problem.constant_weights;
  p.num_tokens = static_cast<int>(problem.num_tokens);
  p.out_features = static_cast<int>(problem.out_features);
  p.in_features = static_cast<int>(problem.in_features);
  p.work.units = p.in_features / tile.depth;
  p.work.token_tiles = static_cast<uint32_t>(divide_up(p.num_tokens, tile.tokens()));
  p.work.tiles = static_cast<uint32_t>(divide_up(p.out_features, tile.features())) * p.work.token_tiles;
  p.work.blocks = plan.grid;
  p.work.whole =
      static_cast<uint32_t>(plan::sm80_whole_tiles(p.work.tiles, plan.grid, plan.split * plan.scratch_split > 1));
  p.partials = static_cast<int32_t*>(scratch);

  cudaError_t error = allow_shared_memory(allowed[plan.tile][grouped], reinterpret_cast<const void*>(kernel),
                                          tile.shared_memory_bytes());
  if (error == cudaSuccess) {
    error = launch_dependent(kernel, plan.grid, plan.threads, tile.shared_memory_bytes(), 1, stream, p);
  }
  if (error != cudaSuccess || p.work.whole == p.work.tiles) return error;
  const int rows = p.num_tokens < tile.tokens() ? p.num_tokens : tile.tokens();
  const dim3 grid(static_cast<unsigned>(divide_up(rows, kReductionTokens)), p.work.tiles - p.work.whole);
  return launch_dependent(reduce_kernel, grid, kReductionThreads, 0, 1, stream, p, tile.tokens(), tile.features());
}

}  // namespace marlin_qqq::cuda::sm80
