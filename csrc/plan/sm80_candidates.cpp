#include "plan/cost.h"
#include "plan/families.h"
#include "plan/sm80_tiles.h"

namespace marlin_qqq::plan {
namespace {

// A multiprocessor's rates. mma.sync int8: 2,048 products a cycle on sm_80; sm_90 measures 2,765, the others 1,024 or
// less: one figure serves to rank tiles, because all tiles use the same instruction.
constexpr double kMacsPerCycle = 2048;
constexpr double kFeedBytesPerCycle = 30;
constexpr double kChannelDequantCycles = 1.5;  // a feature and 128 inputs, for each row of token warps
constexpr double kGroupDequantCycles = 4.0;
constexpr double kLaunchCycles = 3500;
constexpr double kReductionCycles = 3000;  // counters, and the last block's second pass

double estimate_us(const Problem& problem, const DeviceProperties& device, const Sm80Tile& tile, int64_t tiles,
                   int split) {
  const double features = tile.features();
  const double tokens = tile.tokens();
  SliceCycles slice;
  slice.tensor = features * tokens * 128 / kMacsPerCycle;
  slice.dequant = features * tile.token_warps * (problem.group_size > 0 ? kGroupDequantCycles : kChannelDequantCycles);
  slice.feed = (tokens * 128 + features * 64) / kFeedBytesPerCycle;
  const int64_t slots = int64_t{device.num_sms} * tile.blocks_per_sm;
  const int64_t waves = divide_up(tiles * split, slots);
  const double sharing =
      std::min<double>(tile.blocks_per_sm, std::max(1.0, static_cast<double>(tiles * split) / device.num_sms));
  const double slices = std::ceil(static_cast<double>(problem.in_features) / tile.depth / split) * tile.depth / 128;
  // Eight warps alone do not overlap the units fully.
  const double cycles =
      waves * (slices * overlapped(slice, 4) * sharing * 1.2 + features * tokens / 10 + 600) + kLaunchCycles;
  double us = cycles / (device.clock_ghz * 1e3);
  double bytes_us = memory_us(problem, device) * 1.25;
  if (split > 1) {
    us += kReductionCycles / (device.clock_ghz * 1e3) + 1.0;
    bytes_us += 2.0 * 4 * tiles * split * features * std::min<double>(tokens, problem.num_tokens) /
                (2 * 0.94 * device.memory_gb_per_s * 1e3);
  }
  return norm(us, bytes_us, 6);
}

}  // namespace

std::vector<Plan> sm80_candidates(const Problem& problem, const DeviceProperties& device) {
  std::vector<Plan> plans;
  for (int index = 0; index < kSm80TileCount; ++index) {
    const Sm80Tile& tile = kSm80Tiles[index];
    if (tile.shared_memory_bytes() > device.shared_memory_per_block) continue;
    const int64_t stage_count = problem.in_features / tile.depth;
    const int64_t tiles =
        divide_up(problem.num_tokens, tile.tokens()) * divide_up(problem.out_features, tile.features());
    for (int split : {1, 2, 3, 4, 5, 6, 8, 10, 12, 16}) {
      if (split > stage_count) break;
      if (tiles * split > kLargestExtent) break;
      if (split > 1 && tiles * split > int64_t{4} * device.num_sms * tile.blocks_per_sm) break;
      Plan plan;
      plan.family = Family::kSm80;
      plan.tile = index;
      plan.tile_name = std::string(tile.name);
      plan.tile_tokens = tile.tokens();
      plan.tile_features = tile.features();
      plan.stages = tile.stages;
      plan.split = split;
      plan.grid = static_cast<int>(tiles * split);
      plan.threads = tile.threads();
      plan.shared_memory_bytes = tile.shared_memory_bytes();
      if (split > 1) {
        // Counters, then every block's int32 sums.
        plan.scratch_bytes = divide_up(tiles * 4, 256) * 256 + tiles * split * tile.tokens() * tile.features() * 4;
      }
      plan.estimated_us = estimate_us(problem, device, tile, tiles, split);
      plans.push_back(plan);
    }
  }
  return plans;
}

}  // namespace marlin_qqq::plan
