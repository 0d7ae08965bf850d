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

constexpr int kLargestSplit = 16;

// Fixed cycles of a launch: first bytes to arrive, barriers, the end of the last store.
constexpr double kLaunchCycles = 2600;
constexpr double kClusterReductionCycles = 900;
constexpr double kReductionBytesPerCycle = 40;  // distributed shared memory, a block
constexpr double kEpilogueOutputsPerCycle = 24;  // direct stores, a block
constexpr double kReductionKernelUs = 1.0;      // a second, dependent launch
constexpr double kScratchBytesPerUs = 5.0e6;    // sums written and read, in L2
constexpr double kSustainedClock = 0.9;         // of the nominal clock

// Clusters of this many blocks that run at once.
int cluster_slots(const DeviceProperties& device, int cluster_size, int blocks_per_sm) {
  return device.clusters[cluster_size - 1] * blocks_per_sm;
}

double estimate_us(const Problem& problem, const DeviceProperties& device, const Sm90Tile& tile, const Plan& plan) {
  const double features = tile.features();
  const double tokens = tile.tokens;
  const bool grouped = problem.group_size > 0;
  const int cluster_size = plan.split * plan.multicast;
  const int total_split = plan.split * plan.scratch_split;
  const bool partial = tile.depth_split() || total_split > 1;

  SliceCycles slice;
  slice.tensor = features * std::max(tokens, 32.0) * 128 / kMacsPerCycle;
  slice.dequant = features * (grouped ? kGroupDequantCycles : kChannelDequantCycles);
  slice.feed = (tokens * 128 / plan.multicast + features * 64) / kFeedBytesPerCycle;

  const int64_t works = divide_up(problem.num_tokens, tile.tokens) *
                        divide_up(problem.out_features, int64_t{tile.features()} * plan.multicast) * plan.scratch_split;
  const int slots = cluster_slots(device, cluster_size, tile.blocks_per_sm);
  if (slots == 0) return 1e30;
  const int64_t waves = divide_up(works, slots);
  // Blocks that share a multiprocessor share its units.
  const double sharing = std::min<double>(tile.blocks_per_sm,
                                          std::max(1.0, static_cast<double>(works) * cluster_size / device.num_sms));
  const double stages = std::ceil(static_cast<double>(problem.in_features / 128) / total_split);
  double block_cycles = stages * overlapped(slice) * sharing;
  double tail = kLaunchCycles;
  const double outputs = features * tokens;
  if (partial) {
    block_cycles += (plan.split > 1 ? kClusterReductionCycles : 200) + outputs * 4 * tile.rings() / kReductionBytesPerCycle;
  } else {
    // The two warpgroups drift apart, so that one stores while the other multiplies; the last store is not hidden.
    block_cycles += 0.35 * outputs / kEpilogueOutputsPerCycle;
    tail += 0.65 * outputs / kEpilogueOutputsPerCycle;
  }
  const double cycles_a_us = device.clock_ghz * 1e3 * kSustainedClock;
  const double compute_us = waves * block_cycles / cycles_a_us;
  const double bytes_us = memory_us(problem, device);
  double us = std::pow(std::pow(compute_us, 6) + std::pow(bytes_us, 6), 1.0 / 6) + tail / cycles_a_us;
  if (plan.scratch_split > 1) {
    const double sums = 8.0 * plan.scratch_split * static_cast<double>(problem.num_tokens) * problem.out_features;
    us += kReductionKernelUs + sums / kScratchBytesPerUs;
  }
  return us;
}

}  // namespace

std::vector<Plan> sm90_candidates(const Problem& problem, const DeviceProperties& device) {
  std::vector<Plan> plans;
  for (int index = 0; index < kSm90TileCount; ++index) {
    const Sm90Tile& tile = kSm90Tiles[index];
    if (tile.shared_memory_bytes() > device.shared_memory_per_block) continue;
    const int64_t stage_count = problem.in_features / 128;
    for (int multicast : {1, 2, 4}) {
      if (multicast > 1 && (tile.depth_split() || tile.tokens % (8 * multicast) != 0)) continue;
      if (multicast > 1 && problem.out_features <= int64_t{tile.features()} * (multicast / 2)) continue;
      // A split meets in a cluster's shared memory or in scratch, not in both.
      for (int split = 1; split <= std::min<int64_t>(kLargestSplit, stage_count); ++split) {
        for (const bool in_scratch : {false, true}) {
          if (in_scratch ? split == 1 : split * multicast > 8) continue;
          Plan plan;
          plan.family = Family::kSm90;
          plan.tile = index;
          plan.tile_name = std::string(tile.name);
          plan.tile_tokens = tile.tokens;
          plan.tile_features = tile.features();
          plan.stages = tile.stages;
          plan.split = in_scratch ? 1 : split;
          plan.scratch_split = in_scratch ? split : 1;
          plan.multicast = multicast;
          plan.threads = tile.threads();
          plan.shared_memory_bytes = tile.shared_memory_bytes();
          const int cluster_size = plan.split * multicast;
          const bool partial = tile.depth_split() || split > 1;
          const int64_t works = divide_up(problem.num_tokens, tile.tokens) *
                                divide_up(problem.out_features, int64_t{tile.features()} * multicast) *
                                plan.scratch_split;
          const int64_t slots = cluster_slots(device, cluster_size, tile.blocks_per_sm);
          if (slots == 0 || (split > 1 && works > 2 * slots)) continue;
          // A persistent grid walks whole tiles; split tiles have a cluster each.
          const int64_t clusters = partial ? works : std::min(works, slots);
          if (clusters * cluster_size > kLargestExtent) continue;
          plan.grid = static_cast<int>(clusters * cluster_size);
          if (in_scratch) plan.scratch_bytes = 4 * plan.scratch_split * problem.num_tokens * problem.out_features;
          plan.estimated_us = estimate_us(problem, device, tile, plan);
          plans.push_back(plan);
        }
      }
    }
  }
  return plans;
}

}  // namespace marlin_qqq::plan
