#include "cuda/sm80/launch.h"

#include <array>
#include <utility>

#include "cuda/common/shared_memory_limit.h"
#include "cuda/sm80/registry.h"

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
  p.num_tokens = static_cast<int>(problem.num_tokens);
  p.out_features = static_cast<int>(problem.out_features);
  p.in_features = static_cast<int>(problem.in_features);
  p.token_tiles = (p.num_tokens + tile.tokens() - 1) / tile.tokens();
  p.feature_tiles = (p.out_features + tile.features() - 1) / tile.features();
  p.split = plan.split;

  if (plan.split > 1) {
    const int64_t tiles = int64_t{p.token_tiles} * p.feature_tiles;
    const int64_t counter_bytes = (tiles * 4 + 255) / 256 * 256;
    p.counters = static_cast<uint32_t*>(scratch);
    p.partials = reinterpret_cast<int32_t*>(static_cast<char*>(scratch) + counter_bytes);
    if (cudaError_t error = cudaMemsetAsync(p.counters, 0, counter_bytes, stream)) return error;
  }
  if (cudaError_t error = allow_shared_memory(allowed[plan.tile][grouped], reinterpret_cast<const void*>(kernel),
                                              tile.shared_memory_bytes())) {
    return error;
  }
  kernel<<<plan.grid, plan.threads, tile.shared_memory_bytes(), stream>>>(p);
  return cudaGetLastError();
}

}  // namespace marlin_qqq::cuda::sm80
