#include "plan/cost.h"
#include "plan/families.h"
#include "plan/sm80_tiles.h"

namespace marlin_qqq::plan {
namespace {

// mma.sync int8 products a multiprocessor and cycle: 2,048 on sm_80; sm_90 measures 2,765; the others have half of
// sm_80's. What surrounds the products (issue slots, shared memory) is alike on all of them.
double products_per_cycle(int compute_capability) {
  return compute_capability == 90 ? 2765 : compute_capability == 80 ? 2048 : 1024;
}

// Fitted to 1,400 measurements on an H100: what it chooses is 1.1 % slower than the best one measured, on average.
constexpr double kStageCycles = 145;           // barrier, addresses, what does not overlap
constexpr double kSharedMemoryExposed = 0.34;  // part of its cycles that shows beside the products
constexpr double kSharedMemoryBytesPerCycle = 128;
constexpr double kFeedBytesPerCycle = 44;     // L2 to one multiprocessor
constexpr double kGroupCycles = 2.1;          // a feature and 128 inputs, for each row of token warps: dequantisation
constexpr double kEpilogueCycles = 0.3;       // an output
constexpr double kNeighbourCost = 0.36;       // a second block on a multiprocessor takes this part of its own time
constexpr double kPartialBytesPerCycle = 16;  // of a multiprocessor, int32 sums to scratch and back
constexpr double kPartialUs = 0.13;           // a block more that shares a tile

// What a launch does, for the estimate.
struct Launch {
  int64_t tiles;
  int64_t units;  // of a tile: stages of inputs
  int64_t grid;
  int64_t whole;  // tiles that one block has to itself; the rest is shared
  int64_t blocks_per_sm;
};

double estimate_us(const Problem& problem, const DeviceProperties& device, const Sm80Tile& tile, const Launch& launch) {
  const double features = tile.features();
  const double tokens = tile.tokens();
  const bool grouped = problem.group_size > 0;
  const bool dependent_launch = device.compute_capability >= 90;
  const double cycles_per_us = device.clock_ghz * 1e3;

  // Cycles of a unit
  double busy = features * tokens * tile.depth / products_per_cycle(device.compute_capability);
  const double fragment_bytes =
      tile.depth * (tokens * (tile.feature_warps + 1) + features / 2 * (tile.token_warps + 1));
  busy += kStageCycles + kSharedMemoryExposed * fragment_bytes / kSharedMemoryBytesPerCycle;
  if (grouped) busy += kGroupCycles * features * tile.token_warps * tile.depth / 128;
  const double unit = norm(busy, tile.stage_bytes() / kFeedBytesPerCycle, 4);

  // The block with the most units. Where dependent launch brings the next kernel's blocks early, they share a
  // multiprocessor even if another one is free.
  const int64_t shared_tiles = launch.tiles - launch.whole;
  const auto whole = static_cast<double>(divide_up(launch.whole, launch.grid));
  const auto shared_units = static_cast<double>(divide_up(shared_tiles * launch.units, launch.grid));
  const double outputs = features * std::min<double>(tokens, problem.num_tokens);
  const bool neighbours = launch.blocks_per_sm > 1 && (dependent_launch || launch.grid > device.num_sms);
  const double cycles = (neighbours ? 1 + kNeighbourCost : 1.0) *
                        (unit * (whole * launch.units + shared_units) + kEpilogueCycles * outputs * whole);

  // Blocks that share tiles at uneven places of the inputs do not meet in L2: each token tile reads the weights anew.
  const bool even = shared_tiles == 0 || launch.grid % launch.tiles == 0;
  double bytes_us = memory_us(problem, device);
  const double weight_bytes = static_cast<double>(problem.out_features) * problem.in_features / 2;
  if (!even && weight_bytes > 0.7 * device.l2_bytes) {
    const auto token_tiles = static_cast<double>(divide_up(problem.num_tokens, tile.tokens()));
    bytes_us += weight_bytes * (token_tiles - 1) * shared_tiles / launch.tiles / (0.94 * device.memory_gb_per_s * 1e3);
  }

  double fixed_us = dependent_launch ? 1.5 : 2.5;
  if (shared_tiles > 0) {
    const auto parts = static_cast<double>(even ? launch.grid : launch.grid + shared_tiles);
    const auto sms = static_cast<double>(std::min<int64_t>(launch.grid, device.num_sms));
    fixed_us += (dependent_launch ? 2.1 : 3.0) + kPartialUs * parts / shared_tiles +
                2 * 4 * outputs * parts / (kPartialBytesPerCycle * sms * cycles_per_us);
  }
  return norm(cycles / cycles_per_us, bytes_us, 3.8) + fixed_us;
}

}  // namespace

std::vector<Plan> sm80_candidates(const Problem& problem, const DeviceProperties& device) {
  std::vector<Plan> plans;
  for (int index = 0; index < kSm80TileCount; ++index) {
    const Sm80Tile& tile = kSm80Tiles[index];
    if (tile.shared_memory_bytes() > device.shared_memory_per_block) continue;
    // Tiles for the weights' bytes alone: a second token tile would read the weights again.
    if (tile.blocks_per_sm > 1 && problem.num_tokens > tile.tokens()) continue;
    const int64_t units = problem.in_features / tile.depth;
    const int64_t tiles =
        divide_up(problem.num_tokens, tile.tokens()) * divide_up(problem.out_features, tile.features());
    if (tiles > kLargestExtent) continue;
    // A multiprocessor has 1 KB of shared memory more than a block may ask for, and takes 1 KB for each block.
    const int64_t blocks_per_sm = std::min<int64_t>(
        tile.blocks_per_sm, (device.shared_memory_per_block + 1024) / (tile.shared_memory_bytes() + 1024));
    const int64_t slots = device.num_sms * blocks_per_sm;
    const auto add = [&](int64_t grid, int64_t split, int64_t uneven_split) {
      Plan plan;
      plan.family = Family::kSm80;
      plan.tile = index;
      plan.tile_name = std::string(tile.name);
      plan.tile_tokens = tile.tokens();
      plan.tile_features = tile.features();
      plan.stages = tile.stages;
      plan.split = static_cast<int>(split);
      plan.scratch_split = static_cast<int>(uneven_split);
      plan.grid = static_cast<int>(grid);
      plan.threads = tile.threads();
      plan.shared_memory_bytes = tile.shared_memory_bytes();
      // Every block's int32 sums of the two tiles that it may share.
      const bool shares = split * uneven_split > 1;
      if (shares) plan.scratch_bytes = grid * 2 * tile.tokens() * tile.features() * 4;
      plan.estimated_us = estimate_us(problem, device, tile,
                                      {tiles, units, grid, sm80_whole_tiles(tiles, grid, shares), blocks_per_sm});
      plans.push_back(plan);
    };
    // Whole tiles, one block after the other; tiles that 2, 3, ... blocks share evenly; and as many blocks as run at
    // once, which share what is left over from whole tiles, each the same number of units.
    add(std::min(tiles, slots), 1, 1);
    for (const int split : {2, 3, 4, 5, 6, 8, 10, 12, 16}) {
      if (split > units || tiles * split > slots) break;
      add(tiles * split, split, 1);
    }
    const int64_t streams = std::min(slots, tiles * units);
    const int64_t shared_tiles = tiles % streams;
    // A block without a unit would leave scratch unwritten that the reduction reads.
    const bool all_share = shared_tiles * units >= streams;
    if (units > 1 && all_share && streams % tiles != 0 && shared_tiles * units * (streams + 1) <= INT32_MAX) {
      add(streams, 1, std::min(units, divide_up(streams, shared_tiles) + 1));
    }
  }
  return plans;
}

}  // namespace marlin_qqq::plan
