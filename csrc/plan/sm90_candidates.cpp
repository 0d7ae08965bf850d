#include "plan/cost.h"
#include "plan/families.h"
#include "plan/sm90_tiles.h"

namespace marlin_qqq::plan {
namespace {

// A multiprocessor's rates, measured on an H200 (docs/kernel-sm90.md).
constexpr double kMacsPerCycle = 4096;        // int8 wgmma
constexpr double kFeedBytesPerCycle = 30;     // L2 -> shared memory with every multiprocessor reading
constexpr double kChannelDequantCycles = 1.1;  // a feature and 128 inputs, 4 schedulers
constexpr double kGroupDequantCycles = 3.0;

// Fixed cycles of a launch: first bytes to arrive, barriers, the end of the last store.
constexpr double kLaunchCycles = 2600;
constexpr double kClusterReductionCycles = 900;
constexpr double kReductionBytesPerCycle = 40;  // distributed shared memory, a block
constexpr double kEpilogueOutputsPerCycle = 24;  // direct stores, a block

// Clusters of this many blocks that run at once: the blocks of a cluster stay within a GPC of 16 or 18 multiprocessors.
int cluster_slots(int cluster_size, int num_sms, int blocks_per_sm) {
  if (cluster_size <= 2) return num_sms * blocks_per_sm / cluster_size;
  const int gpcs = num_sms / 16 > 0 ? num_sms / 16 : 1;
  const int per_gpc = num_sms / gpcs * blocks_per_sm / cluster_size;
  return gpcs * per_gpc;
}

double estimate_us(const Problem& problem, const DeviceProperties& device, const Sm90Tile& tile, const Plan& plan) {
  const double features = tile.features();
  const double tokens = tile.tokens;
  const bool grouped = problem.group_size > 0;
  const bool partial = tile.cooperation == Cooperation::kDepth || plan.split > 1;
  const int cluster_size = plan.split * plan.multicast;

  SliceCycles slice;
  slice.tensor = features * std::max(tokens, 32.0) * 128 / kMacsPerCycle;
  slice.dequant = features * (grouped ? kGroupDequantCycles : kChannelDequantCycles) * (tile.blocks == 1 ? 1.25 : 1.0);
  slice.feed = (tokens * 128 / plan.multicast + features * 64) / kFeedBytesPerCycle;

  const double slices = static_cast<double>(problem.in_features) / 128;
  const int64_t works = divide_up(problem.num_tokens, tile.tokens) *
                        divide_up(problem.out_features, int64_t{tile.features()} * plan.multicast);
  const int slots = cluster_slots(cluster_size, device.num_sms, tile.blocks_per_sm);
  if (slots == 0) return 1e30;
  const int64_t waves = divide_up(works, slots);
  // Blocks that share a multiprocessor share its units.
  const double sharing = std::min<double>(tile.blocks_per_sm, std::max(1.0, static_cast<double>(works) * cluster_size / device.num_sms));
  const double stage_slices = std::ceil(divide_up(problem.in_features, tile.depth()) / static_cast<double>(plan.split)) * tile.slices();
  const double mainloop = std::min(stage_slices, slices) * overlapped(slice) * sharing;
  double block_cycles = mainloop;
  double tail = kLaunchCycles;
  const double outputs = features * tokens;
  if (partial) {
    const double reduction = (plan.split > 1 ? kClusterReductionCycles : 200) + outputs * 4 * tile.slices() / kReductionBytesPerCycle;
    block_cycles += reduction;
  } else {
    // The two warpgroups drift apart, so that one stores while the other multiplies; the last store is not hidden.
    block_cycles += 0.35 * outputs / kEpilogueOutputsPerCycle;
    tail += 0.65 * outputs / kEpilogueOutputsPerCycle;
  }
  const double compute_us = (waves * block_cycles) / (device.clock_ghz * 1e3);
  const double bytes_us = memory_us(problem, device) * (partial ? static_cast<double>(waves * slots) / std::max<int64_t>(works, 1) > 1.5 && waves > 1 ? 1.1 : 1.0 : 1.0);
  const double both = std::pow(std::pow(compute_us, 6) + std::pow(bytes_us, 6), 1.0 / 6);
  return both + tail / (device.clock_ghz * 1e3) + 0.02 * cluster_size;
}

}  // namespace

std::vector<Plan> sm90_candidates(const Problem& problem, const DeviceProperties& device) {
  std::vector<Plan> plans;
  for (int index = 0; index < kSm90TileCount; ++index) {
    const Sm90Tile& tile = kSm90Tiles[index];
    if (tile.shared_memory_bytes() > device.shared_memory_per_block) continue;
    const int64_t stage_count = divide_up(problem.in_features, tile.depth());
    for (int multicast : {1, 2, 4}) {
      if (tile.tokens % (8 * multicast) != 0) continue;
      if (tile.cooperation == Cooperation::kDepth && multicast > 1) continue;
      if (multicast > 1 && problem.out_features <= int64_t{tile.features()} * (multicast / 2)) continue;
      for (int split = 1; split * multicast <= 8; ++split) {
        if (split > stage_count) break;
        Plan plan;
        plan.family = Family::kSm90;
        plan.tile = index;
        plan.tile_name = std::string(tile.name);
        plan.tile_tokens = tile.tokens;
        plan.tile_features = tile.features();
        plan.stages = tile.stages;
        plan.split = split;
        plan.multicast = multicast;
        plan.threads = tile.threads();
        plan.shared_memory_bytes = tile.shared_memory_bytes();
        const int64_t works = divide_up(problem.num_tokens, tile.tokens) *
                              divide_up(problem.out_features, int64_t{tile.features()} * multicast);
        const int cluster_size = split * multicast;
        const bool partial = tile.cooperation == Cooperation::kDepth || split > 1;
        const int64_t slots = std::max(1, cluster_slots(cluster_size, device.num_sms, tile.blocks_per_sm));
        // A persistent grid walks whole tiles; split tiles have a cluster each.
        const int64_t clusters = partial ? works : std::min(works, slots);
        if (clusters * cluster_size > kLargestExtent) continue;
        plan.grid = static_cast<int>(clusters * cluster_size);
        plan.estimated_us = estimate_us(problem, device, tile, plan);
        plans.push_back(plan);
      }
    }
  }
  return plans;
}

}  // namespace marlin_qqq::plan
