#include "cuda/sm90/launch.h"

#include <algorithm>
#include <array>
#include <bit>
#include <utility>

#include "cuda/common/launch_dependent.h"
#include "cuda/common/shared_memory_limit.h"
#include "cuda/common/tensor_map.h"
#include "cuda/sm90/reduction.cuh"
#include "cuda/sm90/registry.h"
#include "format/divide_up.h"
#include "plan/families.h"

namespace marlin_qqq::cuda::sm90 {
namespace {

constexpr int kVariants = 3;

// Of one tile: by variant, per-channel and with group scales; null where there is none.
template <int kTileIndex, int... kKernels>
std::array<Kernel, 2 * kVariants> kernels_of(std::integer_sequence<int, kKernels...>) {
  std::array<Kernel, 2 * kVariants> kernels = {};
  const auto add = [&]<int kKernel>(std::integral_constant<int, kKernel>) {
    constexpr auto kVariant = static_cast<Variant>(kKernel / 2);
    constexpr bool kGrouped = kKernel % 2 != 0;
    if constexpr (kernel_exists(plan::kSm90Tiles[kTileIndex], kGrouped, kVariant)) {
      kernels[kKernel] = kernel_of<kTileIndex, kGrouped, kVariant>();
    }
  };
  (add(std::integral_constant<int, kKernels>()), ...);
  return kernels;
}

template <int... kTileIndices>
std::array<std::array<Kernel, 2 * kVariants>, sizeof...(kTileIndices)> make_kernels(
    std::integer_sequence<int, kTileIndices...>) {
  return {kernels_of<kTileIndices>(std::make_integer_sequence<int, 2 * kVariants>())...};
}

Kernel kernel_for(int tile, bool grouped, Variant variant) {
  static const auto kernels = make_kernels(std::make_integer_sequence<int, plan::kSm90TileCount>());
  return kernels[tile][2 * static_cast<int>(variant) + grouped];
}

cudaError_t allow_shared_memory_of(int tile, bool grouped, Variant variant) {
  static std::atomic<uint64_t> done[plan::kSm90TileCount][2][kVariants];
  return allow_shared_memory(
      done[tile][grouped][static_cast<int>(variant)], reinterpret_cast<const void*>(kernel_for(tile, grouped, variant)),
      variant == Variant::kQuantizing ? plan::kSm90LargestBlockMemory : plan::kSm90Tiles[tile].shared_memory_bytes());
}

// Stages of a ring whose weights a block fetches before it waits for the kernel before: to the ring where the caller
// promised that they are constant, else to L2. What is on its way while that kernel ends is time won on the memory bus;
// but it is in the way of that kernel's last loads and of a quantisation between the two, which the product then waits
// for. Measured on an H100, none to seven stages, with and without a quantisation, on 18 layers from 1 to 256 tokens.
int early_stages(const plan::Sm90Tile& tile, const plan::Plan& plan, const plan::Problem& problem,
                 const Parameters& p) {
  const bool grouped = problem.group_size > 0;
  if (!tile.depth_split() && problem.num_tokens <= 64) return 5;
  // The kernel before is a quantisation, or one that has ended: rows and activations are asked for very soon, and what
  // is on its way is in theirs.
  if (problem.standalone && tile.depth_split()) {
    if (plan.quantizes && tile.warp_rings()) return 1;
    if (problem.num_tokens <= 32 && plan::has_few_weights(problem)) return 2;
  }
  if (!problem.constant_weights) {
    if (!tile.depth_split() || tile.blocks_per_sm > 1 || !plan.leaves_room()) return 2;
    // The kernel before is on the rest of the device, fetching weights of its own at that moment.
    return plan.leaves_half() && !grouped ? 0 : 1;
  }
  // Warpgroups must not wait early for more than they dequantise: their mainloop waits for the activations alone.
  if (p.dequantizes_early) return tile.warp_rings() ? tile.stages : tile.stages_ahead(grouped);
  // The last stage of a ring is left, for its weights would stand in front of the first activations.
  if (problem.num_tokens <= 32) return std::min(p.used_stages - 1, grouped && tile.blocks_per_sm == 1 ? 3 : 4);
  if (problem.num_tokens > 96) return 2;
  // Rings of three stages do best with one early; per-channel, short rings of four warpgroups are the sooner in a
  // quantisation's way.
  const bool four_rings = tile.rings() == 4;
  if (grouped && four_rings) return tile.tokens > 64 ? 1 : 2;
  if (grouped) return !tile.depth_split() && tile.tokens <= 80 ? 4 : 2;
  if (four_rings && plan::sm90_ring_stages(problem, plan) <= 10) return 2;
  return std::min(plan.leaves_room() ? p.used_stages : p.used_stages - 1, 4);
}

// How blocks that may start while the kernel before this one still runs fetch their first weights.
//
// A short product is mostly dequantisation. Where another launch has its part of the device, this one's blocks wait
// long enough to do the first stages' meanwhile (plan::sm90_stages_ahead). Elsewhere the weights arrive too late for
// that, and what is fetched after the wait would then be asked for late.
//
// They ask for one stage a ring after the other: 64 blocks' eight rings then have 2 MB on their way, which the memory
// bus needs to be busy. More fill the queues in which that other launch's activations wait, and a block that gets its
// own late holds up the launch after it: 4096x4096 per-channel 3.9 us in place of 3.1. (Per-channel there is less to do
// between one stage and the next: of four stages of up to eight tokens two at a time are 1 to 7 % better than one.)
void plan_early_fetch(Parameters& p, const plan::Sm90Tile& tile, const plan::Plan& plan, const plan::Problem& problem) {
  p.used_stages = plan.stages;
  p.early_blocks = plan.resident_blocks;
  p.early_into_ring = problem.constant_weights;
  p.dequantizes_early = plan::sm90_stages_ahead(problem, plan) > 0;
  p.early_stages = std::min(early_stages(tile, plan, problem, p), p.used_stages);
  const bool four = std::min<int64_t>(plan::sm90_ring_stages(problem, plan), tile.stages) >= 4;
  p.early_in_flight = four && tile.tokens == 8 && problem.group_size <= 0 ? 2 : 1;
}

// Whether neighbouring blocks should share activations, not weights (TileOrder). Measured on an H100 on 27 problems:
// where there are many tokens for the features, and the weights stay in L2, 1 to 16 % less time; with few tokens or
// weights that come from memory 0 to 2 % more.
bool features_come_first(const plan::Problem& problem) {
  constexpr int64_t kWeightsInL2 = int64_t{32} << 20;
  return 8 * problem.num_tokens >= problem.out_features && plan::packed_weight_bytes(problem) <= kWeightsInL2;
}

}  // namespace

cudaError_t launch(const plan::Plan& plan, const plan::Problem& problem, const GemmArguments& arguments, void* scratch,
                   cudaStream_t stream) {
  const plan::Sm90Tile& tile = plan::kSm90Tiles[plan.tile];
  const bool grouped = arguments.group_scale != nullptr;
  const auto tokens = static_cast<uint64_t>(problem.num_tokens);
  const auto features = static_cast<uint64_t>(problem.out_features);
  const auto inputs = static_cast<uint64_t>(problem.in_features);

  Parameters p = {};
  cudaError_t error = cudaSuccess;
  if (plan.quantizes) {
    p.x = arguments.rows.x;
    p.x_row_stride = arguments.rows.stride;
    p.x_is_bfloat16 = arguments.rows.bfloat16;
    p.token_warps_log2 = std::countr_zero(static_cast<unsigned>(tile.token_warps(problem.num_tokens)));
    if (plan.scratch_split > 1) {  // behind the sums
      p.found_token_scale =
          static_cast<float*>(scratch) + plan.scratch_split * problem.num_tokens * problem.out_features;
    }
  } else {
    p.activation_rows = tile.activation_rows(problem.num_tokens, plan.multicast);
    p.activation_bytes = 128 * p.activation_rows * tile.activation_copies(plan.multicast);
    error = encode_tensor_map(&p.activations, ElementType::kInt8, arguments.activations, tokens, inputs,
                              p.activation_rows, 128, /*swizzle=*/true);
  }
  if (error == cudaSuccess) {
    error = encode_tensor_map(&p.weights, ElementType::kUInt32, arguments.packed_weight, inputs / 16, 2 * features, 8,
                              2 * tile.panel_features(), /*swizzle=*/false);
  }
  if (error == cudaSuccess && grouped) {
    error = encode_tensor_map(&p.group_scales, ElementType::kUInt16, arguments.group_scale, inputs / 128, features, 1,
                              tile.panel_features(), /*swizzle=*/false);
  }
  const bool partial = tile.depth_split() || plan.scratch_split > 1;
  if (error == cudaSuccess && !partial) {
    error = encode_tensor_map(&p.output, ElementType::kUInt16, arguments.output, tokens, features, tile.store_rows(),
                              64, /*swizzle=*/true);
  }
  plan_early_fetch(p, tile, plan, problem);
  const Variant variant = plan.quantizes        ? Variant::kQuantizing
                          : p.dequantizes_early ? Variant::kAhead
                                                : Variant::kPlain;
  if (error == cudaSuccess) error = allow_shared_memory_of(plan.tile, grouped, variant);
  if (error != cudaSuccess) return error;

  p.token_scale = plan.quantizes ? p.found_token_scale : arguments.token_scale;
  p.channel_scale = arguments.channel_scale;
  p.bias = arguments.bias;
  p.output_pointer = arguments.output;
  p.output_is_bfloat16 = arguments.output_type == OutputType::kBFloat16;
  p.num_tokens = static_cast<int>(problem.num_tokens);
  p.out_features = static_cast<int>(problem.out_features);
  p.stage_count = static_cast<int>(divide_up(problem.in_features, 128));
  p.order = TileOrder::of(static_cast<int>(tile.token_tiles(problem.num_tokens)),
                          static_cast<int>(tile.feature_groups(problem.out_features, plan.multicast)),
                          plan.resident_blocks / (plan.split * plan.multicast), features_come_first(problem));
  p.works = p.order.token_tiles * p.order.feature_groups * plan.scratch_split;
  p.whole_works = partial && !tile.flows() ? 0
                  : plan.split == 1        ? p.works
                                           : plan.whole_rounds * (plan.grid / plan.multicast);
  p.split = plan.split;
  p.scratch_split = plan.scratch_split;
  p.scratch = static_cast<int32_t*>(scratch);
  p.multicast = plan.multicast;

  error = launch_dependent(kernel_for(plan.tile, grouped, variant), plan.grid, plan.threads, plan.shared_memory_bytes,
                           plan.split * plan.multicast, stream, p);
  if (error != cudaSuccess || plan.scratch_split == 1) return error;

  const Reduction reduction = {p.scratch,        p.token_scale,        p.channel_scale,    p.bias,
                               p.output_pointer, p.output_is_bfloat16, plan.scratch_split, p.num_tokens,
                               p.out_features};
  const int64_t vectors = problem.num_tokens * problem.out_features / 4;
  return launch_dependent(reduce_kernel, static_cast<unsigned>(divide_up(vectors, kReductionThreads)),
                          kReductionThreads, 0, 1, stream, reduction);
}

cudaError_t max_active_clusters(int cluster_size, int* clusters) {
  constexpr int kTile = plan::sm90_tile_index("deep256");
  if (cudaError_t error = allow_shared_memory_of(kTile, true, Variant::kPlain)) return error;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster_size;
  attribute.val.clusterDim.y = 1;
  attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(cluster_size);
  config.blockDim = dim3(plan::kSm90Tiles[kTile].threads());
  config.dynamicSmemBytes = plan::kSm90Tiles[kTile].shared_memory_bytes();
  config.attrs = &attribute;
  config.numAttrs = 1;
  const cudaError_t error = cudaOccupancyMaxActiveClusters(clusters, kernel_for(kTile, true, Variant::kPlain), &config);
  if (error != cudaErrorInvalidClusterSize) return error;
  (void)cudaGetLastError();
  *clusters = 0;  // a part of a GPU that is too small for them
  return cudaSuccess;
}

}  // namespace marlin_qqq::cuda::sm90
