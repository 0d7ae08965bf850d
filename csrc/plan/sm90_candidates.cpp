#include "plan/cost.h"
#include "plan/families.h"
#include "plan/sm90_tiles.h"

namespace marlin_qqq::plan {
namespace {

// Constants of the model, fitted to a sweep of 1,100 candidates on an H200 so that the candidate it ranks first is as
// fast as the best one (docs/kernel-sm90.md). Cycles are of the nominal clock.
constexpr double kMacsPerCycle = 3880;          // int8 wgmma, a multiprocessor
constexpr double kFeedBytesPerCycle = 80;       // L2 -> shared memory, a multiprocessor
constexpr double kChannelDequantCycles = 0.94;  // a feature and 128 inputs, a multiprocessor
constexpr double kGroupDequantCycles = 4.1;
constexpr double kUnitNorm = 1.9;  // how well the units overlap: the larger, the better

// A ring's stage takes at least this long, however idle the multiprocessor is.
constexpr double kChannelStageLatency = 230;
constexpr double kGroupStageLatency = 570;
constexpr double kStageLatencyPerToken = 0.46;  // and 64 features
constexpr double kLatencyNorm = 2.07;

constexpr int kLargestSplit = 16;
constexpr double kLaunchCycles = 5000;             // first bytes to arrive, barriers, the last store
constexpr double kClusterReductionCycles = 2400;   // of a cluster of two,
constexpr double kClusterReductionPerBlock = 540;  // and for every further block
constexpr double kBlockReductionCycles = 200;      // within a block
constexpr double kReductionBytesPerCycle = 163;
constexpr double kEpilogueOutputsPerCycle = 200;  // direct stores of the last tile
constexpr double kWaveCycles = 1500;
constexpr double kReductionKernelUs = 0.41;   // a second, dependent launch
constexpr double kScratchBytesPerUs = 4.5e6;  // sums written and read, in L2
constexpr double kMulticastPenalty = 0.044;   // a block that shares activations waits for its neighbours
constexpr double kModelBandwidth = 0.717;     // of the bus's rate

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

  const SliceCycles slice = {features * tokens * 128 / kMacsPerCycle,
                             features * (grouped ? kGroupDequantCycles : kChannelDequantCycles),
                             (tokens * 128 / plan.multicast + features * 64) / kFeedBytesPerCycle};
  const int64_t works = divide_up(problem.num_tokens, tile.tokens) *
                        divide_up(problem.out_features, int64_t{tile.features()} * plan.multicast) * plan.scratch_split;
  const int slots = cluster_slots(device, cluster_size, tile.blocks_per_sm);
  if (slots == 0) return 1e30;
  const auto waves = static_cast<double>(divide_up(works, slots));
  // Blocks that share a multiprocessor share its units: what counts is how many of them the fullest one gets to run.
  const int usable_sms = device.clusters[cluster_size - 1] * cluster_size;
  const auto rounds = static_cast<double>(divide_up(works * cluster_size, usable_sms));
  const auto stages = static_cast<double>(divide_up(problem.in_features / 128, total_split));
  const double latency =
      (grouped ? kGroupStageLatency : kChannelStageLatency) + kStageLatencyPerToken * tokens * tile.blocks;
  const double mainloop = norm(rounds * stages * overlapped(slice, kUnitNorm),
                               waves * std::ceil(stages / tile.rings()) * latency, kLatencyNorm);

  const double outputs = features * tokens;
  double ending = kWaveCycles;
  double tail = kLaunchCycles;
  if (partial) {
    ending += plan.split == 1 ? kBlockReductionCycles
                              : kClusterReductionCycles + kClusterReductionPerBlock * (plan.split - 2);
    ending += outputs * 4 * tile.rings() / kReductionBytesPerCycle;
  } else {
    tail += outputs / kEpilogueOutputsPerCycle;  // the stores before the last tile's are hidden
  }
  const double cycles_a_us = device.clock_ghz * 1e3;
  const double compute_us = (mainloop + waves * ending) / cycles_a_us * (1 + kMulticastPenalty * (plan.multicast - 1));
  const double bytes_us = problem_bytes(problem) / (kModelBandwidth * device.memory_gb_per_s * 1e3);
  double us = norm(compute_us, bytes_us, 4) + tail / cycles_a_us;
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
