#include "plan/cost.h"
#include "plan/families.h"
#include "plan/sm90_model.h"
#include "plan/sm90_tiles.h"

namespace marlin_qqq::plan {
namespace {

constexpr int kLargestSplit = 16;

// Multiply-adds of a product that takes about a third of a millisecond: there the clock falls within a launch.
constexpr double kLongProduct = 3e11;

double multiply_adds(const Problem& problem) {
  return static_cast<double>(problem.num_tokens) * problem.out_features * problem.in_features;
}

// Beyond this many tokens little of a launch overlaps with its neighbours, and the constants of launches that stand
// alone are not fitted to it: those of the others rank them.
constexpr int64_t kMostLoneTokens = 512;

// Whether tiles of 64 features, each of whose inputs as many blocks share as find a multiprocessor, leave no more than
// a fifth of the device idle.
bool own_rings_fill(const Problem& problem, const DeviceProperties& device) {
  const int64_t tiles = problem.out_features / 64;
  const int64_t busy = device.num_sms / tiles * tiles;
  return 5 * busy >= 4 * device.num_sms;
}

// Clusters of this many blocks that run at once.
int cluster_slots(const DeviceProperties& device, int cluster_size, int blocks_per_sm) {
  return device.clusters[cluster_size - 1] * blocks_per_sm;
}

// What the quantisation adds to a launch that stands alone, over a kernel of its own, in microseconds: fitted to 393
// pairs of launches with and without it, of 54 layers of 1 to 235 MB at 1 to 8 tokens, behind a kernel that lets
// nothing start early, on an H100 and an H200 (benchmarks/results/sweeps). The rows are there when the launch begins,
// and their quantisation hides behind the first weights; a kernel of its own comes before them.
double standalone_quantization_us(const Problem& problem, const Plan& plan) {
  if (!plan.quantizes) return 0;
  const Sm90Tile& tile = kSm90Tiles[plan.tile];
  const double row = static_cast<double>(problem.in_features) / 4096;
  const auto tokens = static_cast<double>(problem.num_tokens);
  const bool grouped = problem.group_size > 0;
  if (tile.flows()) return grouped ? -0.7 + 0.15 * tokens * row : -0.95 + 0.03 * tokens * row;
  if (tile.warp_rings()) {
    // The blocks of every round quantise anew.
    const auto later_rounds = static_cast<double>(divide_up(plan.grid, plan.resident_blocks) - 1);
    return grouped ? -0.84 + 0.12 * tokens + 0.42 * later_rounds : -0.95 + 0.15 * tokens;
  }
  if (tile.blocks_per_sm == 1) return 0.55 + (grouped ? 0.15 : 0.06) * tokens * row;
  return (grouped ? -0.5 : -1.1) + 0.33 * tokens * row;
}

// What the quantisation of its activations adds to a product, in microseconds: as measured on an H100, back to back in
// a graph, on 21 layers of 8 to 117 MB at 1 to 8 tokens, and, where the two ways were level there, in rows of different
// layers. There a product that quantises is late where the layer before leaves it little room, with group scales most:
// a decoder layer of 4096 features took 55 us at two tokens, and 50 with the kernel of its own. Of a launch that does
// not quantise nothing counts, so that those candidates of a problem keep the order that they have without.
double quantization_us(const Problem& problem, const DeviceProperties& device, const Plan& plan) {
  if (problem.standalone) return standalone_quantization_us(problem, plan);
  const bool grouped = problem.group_size > 0;
  const auto tokens = static_cast<double>(problem.num_tokens);
  const double weight_mb = static_cast<double>(problem.out_features * problem.in_features) / 2e6;
  const bool half = problem.out_features / 64 * 2 <= device.num_sms;  // two products share the multiprocessors
  if (plan.quantizes) {
    // The rows from L2, their largest magnitudes, the rounding: waited for, unless there are many weights to fetch.
    if (!kSm90Tiles[plan.tile].warp_rings()) {
      if (grouped) return (weight_mb < 28 ? 1.0 : 0.0) + 0.31 * tokens;
      return 0.15 * tokens * std::max(1.0, static_cast<double>(problem.in_features) / 6144);
    }
    if (weight_mb > 16) return (grouped ? 0.31 : 0.12) * tokens;
    if (!half) return 0.55 + 0.2 * tokens;
    return grouped ? 0.35 + 0.17 * tokens : 0.25 + 0.12 * tokens;
  }
  // A kernel of its own hides behind the weights that the product fetches meanwhile, if they are many.
  if (half && weight_mb <= 10) return grouped ? 1.6 - 0.11 * weight_mb : 1.0;
  if (grouped) return 0.6;
  return half ? 0.5 : 0.7;
}

// Whether nothing of a launch's beginning is hidden: no weights are on their way while the launch before ends.
bool is_exposed(const Problem& problem) { return !problem.constant_weights || problem.standalone; }

// Part of its time that a launch loses where blocks share activations, and what it wins or loses at the power limit.
double lost_to_neighbours_and_power(const Problem& problem, const Plan& plan, double waves, const Sm90Model& model) {
  constexpr double kMulticastFeatures = 128;
  const Sm90Tile& tile = kSm90Tiles[plan.tile];
  const double waiting = model.multicast_penalty * (plan.multicast - 1);
  if (!sm90_is_power_limited(problem)) return waiting;
  // Turns keep shared memory busy in every cycle: in a row of launches they lose more against other tiles than in a
  // burst after a rest.
  if (tile.pingpong()) return waiting + (plan.multicast > 1 ? model.shared_turns_power_loss : model.turns_power_loss);
  // What is sent to several blocks comes from L2 once; that is the more a product, the fewer features a block has. In
  // the first round it saved nothing.
  const double copies_saved = 2 * (1 - 1.0 / plan.multicast);
  return waiting - model.multicast_power_saving * copies_saved * kMulticastFeatures / tile.features() * (1 - 1 / waves);
}

// Of rings that flow on from tile to tile: they wait for the memory bus or for the fullest multiprocessor's work.
double flow_us(const Problem& problem, const DeviceProperties& device, const Plan& plan, const Sm90Model& model) {
  const Sm90Tile& tile = kSm90Tiles[plan.tile];
  const bool grouped = problem.group_size > 0;
  const double later_octets = tile.tokens / 8 - 1;
  const double stage_cycles = grouped
                                  ? model.flow_group_stage_cycles + later_octets * model.flow_group_octet_cycles
                                  : model.flow_channel_stage_cycles + later_octets * model.flow_channel_octet_cycles;
  const double ring_stages = static_cast<double>(problem.in_features / 128) / tile.rings();
  const double tiles = static_cast<double>(problem.out_features / tile.features()) / plan.resident_blocks;
  const double most_tiles = plan.split > 1 ? plan.whole_rounds + 1.0 / plan.split : std::ceil(tiles);
  const double tile_cycles = ring_stages * stage_cycles + model.flow_tile_cycles;
  double cycles = most_tiles * tile_cycles;
  if (!is_exposed(problem)) cycles -= model.flow_hidden_fraction * (most_tiles - tiles) * tile_cycles;
  if (plan.split > 1) cycles += model.flow_cluster_cycles;
  const double bytes_us = problem_bytes(problem) / (model.flow_bandwidth_fraction * device.memory_gb_per_s * 1e3);
  const double cycles_a_us = device.clock_ghz * 1e3;
  const double us =
      norm(cycles / cycles_a_us, bytes_us, model.flow_bandwidth_norm) + model.flow_launch_cycles / cycles_a_us;
  return problem.standalone ? us - model.flow_alone_us : us;
}

}  // namespace

bool sm90_is_power_limited(const Problem& problem) {
  constexpr int64_t kManyTokens = 1024;
  constexpr double kProducts = 6.5e10;
  return problem.num_tokens >= kManyTokens && multiply_adds(problem) > kProducts;
}

int64_t sm90_ring_stages(const Problem& problem, const Plan& plan) {
  const int rings = kSm90Tiles[plan.tile].rings() * plan.split * plan.scratch_split;
  return divide_up(problem.in_features / 128, rings);
}

int sm90_used_stages(const Problem& problem, const Plan& plan) {
  constexpr int kFewest = 3;
  constexpr int kLongRing = 32;
  constexpr int kLongWarpRing = 24;
  const Sm90Tile& tile = kSm90Tiles[plan.tile];
  const bool one_round = tile.walks() || plan.grid <= plan.resident_blocks;
  if (plan.quantizes || tile.pingpong() || tile.tokens > 112 || !one_round) return tile.stages;
  const bool long_ring = tile.depth_split() && !tile.flows() && tile.tokens <= 48 &&
                         sm90_ring_stages(problem, plan) >= (tile.warp_rings() ? kLongWarpRing : kLongRing);
  const bool waits_for_weights =
      problem.standalone && tile.tokens <= 32 && (problem.group_size > 0 || !has_few_weights(problem));
  if (problem.constant_weights && !long_ring && !waits_for_weights) return tile.stages;
  const int stage_bytes = tile.stage_bytes(problem.group_size > 0);
  const int bytes = (tile.tokens <= 32 ? 115 : 130) * 1024;
  const auto stages = static_cast<int>(divide_up(bytes, tile.blocks_per_sm * tile.rings() * stage_bytes));
  return std::min(std::max(stages, kFewest), tile.stages);
}

int sm90_stages_ahead(const Problem& problem, const Plan& plan) {
  const Sm90Tile& tile = kSm90Tiles[plan.tile];
  const bool grouped = problem.group_size > 0;
  if (!problem.constant_weights || problem.standalone) return 0;
  if (!(tile.warp_rings() ? plan.leaves_room() : plan.leaves_half())) return 0;
  const int stages = tile.stages_ahead(grouped);
  const bool holds_all = sm90_ring_stages(problem, plan) <= tile.stages;
  return stages > 0 && grouped && tile.warp_rings() && holds_all ? tile.stages : stages;
}

double sm90_estimated_us(const Problem& problem, const DeviceProperties& device, const Plan& plan,
                         const Sm90Model& model) {
  const Sm90Tile& tile = kSm90Tiles[plan.tile];
  const double features = tile.features();
  const double tokens = tile.tokens;
  const bool grouped = problem.group_size > 0;
  const int cluster_size = plan.split * plan.multicast;
  const int total_split = plan.split * plan.scratch_split;
  const double quantization = problem.quantizes ? quantization_us(problem, device, plan) : 0;
  if (tile.flows()) return flow_us(problem, device, plan, model) + quantization;

  const SliceCycles slice = {
      features * tokens * 128 / (tile.pingpong() ? model.turn_macs_per_cycle : model.macs_per_cycle),
      features * (grouped ? model.group_dequant_cycles : model.channel_dequant_cycles) *
          (tile.warp_rings() ? model.warp_dequant_fraction
           : tile.blocks > 1 ? model.two_products_dequant_fraction
                             : 1.0),
      (tokens * 128 / plan.multicast + features * 64) / model.feed_bytes_per_cycle};
  const int64_t works = tile.token_tiles(problem.num_tokens) *
                        tile.feature_groups(problem.out_features, plan.multicast) * plan.scratch_split;
  const int slots = cluster_slots(device, cluster_size, tile.blocks_per_sm);
  if (slots == 0) return 1e30;
  // After rounds of whole tiles, if there are any, one of tiles that clusters share.
  const double whole_rounds = plan.whole_rounds;
  const double last_waves = plan.whole_rounds > 0 ? 1.0 : static_cast<double>(divide_up(works, slots));
  // Blocks that share a multiprocessor share its units: what counts is how many of them the fullest one gets to run.
  const int usable_sms = device.clusters[cluster_size - 1] * cluster_size;
  const double last_rounds =
      plan.whole_rounds > 0 ? 1.0 : static_cast<double>(divide_up(works * cluster_size, usable_sms));
  const auto stages = static_cast<double>(divide_up(problem.in_features / 128, total_split));
  const double whole_stages = whole_rounds * static_cast<double>(problem.in_features / 128);
  const double second_product = tile.blocks - 1;
  const double later_octets = tokens / 8 - 1;
  const double channel_latency =
      tile.warp_rings() ? model.warp_channel_stage_latency + later_octets * model.warp_channel_octet_latency
                        : model.channel_stage_latency + second_product * model.channel_product_latency;
  const double group_latency = tile.warp_rings()
                                   ? model.warp_group_stage_latency + later_octets * model.warp_group_octet_latency
                                   : model.group_stage_latency + second_product * model.group_product_latency;
  const double rings_fraction = tile.four_warps()
                                    ? (grouped ? model.four_warps_group_fraction : model.four_warps_channel_fraction)
                                : tile.depth_split() ? 1.0
                                : grouped            ? model.shared_ring_group_fraction
                                                     : model.shared_ring_channel_fraction;
  const double latency =
      std::max(((grouped ? group_latency : channel_latency) + model.stage_latency_per_token * tokens * tile.blocks) *
                   rings_fraction,
               model.memory_latency / tile.stages);
  const double unit_norm = !grouped             ? model.channel_unit_norm
                           : tile.depth_split() ? model.group_unit_norm
                                                : model.shared_ring_group_unit_norm;
  const auto ring_stages = static_cast<double>(sm90_ring_stages(problem, plan));
  // How much of another launch finds multiprocessors beside this one. Where its blocks do not all, the launch ends with
  // those that start late.
  const bool counts = !problem.standalone && (tile.blocks_per_sm == 1 || tile.warp_rings());
  const bool fits_beside = counts && 2 * works <= slots;
  double beside = fits_beside ? 1.0 : 0.0;
  if (counts && !fits_beside && works < slots) {
    beside = model.unfit_fraction * std::pow(static_cast<double>(slots - works) / works, model.unfit_power);
  }
  // Of a ring's stages, what is dequantised while the launch before ends, by all blocks or by those that find room.
  const double ahead = std::min<double>(ring_stages, sm90_stages_ahead(problem, plan)) *
                       (fits_beside ? 1.0 : model.ahead_unfit_fraction);
  const double mainloop = norm((whole_stages + last_rounds * stages) * overlapped(slice, unit_norm),
                               (whole_stages + last_waves * ring_stages) * latency, model.latency_norm) *
                          (1 - std::min(model.ahead_fraction * ahead / ring_stages, 1.0));

  const double outputs = features * tokens;
  double ending = tile.depth_split() ? model.depth_wave_cycles : model.wave_cycles;
  if (tile.large()) ending += model.large_wave_cycles;
  double tail = model.launch_cycles;
  if (tile.depth_split() || plan.scratch_split > 1) {
    ending += outputs * 4 * tile.rings() /
              (tile.warp_rings()   ? model.warp_apart_bytes_per_cycle
               : tile.sums_apart() ? model.apart_bytes_per_cycle
                                   : model.reduction_bytes_per_cycle);
  } else {
    tail += outputs / plan.split / model.epilogue_outputs_per_cycle;  // the stores before the last tile's are hidden
  }
  double exchange = 0;
  if (plan.split > 1) {
    // Straight from the registers, or what the rings of each block add up to.
    const bool rings = tile.depth_split();
    const double exchanged = outputs * 4 * (plan.split - 1) / plan.split;
    exchange = rings ? model.depth_cluster_cycles + model.depth_cluster_per_block * (plan.split - 2) +
                           exchanged / model.depth_exchange_bytes_per_cycle
                     : model.cluster_reduction_cycles + model.cluster_reduction_per_block * (plan.split - 2) +
                           exchanged / model.exchange_bytes_per_cycle;
  }
  // Half a grid: two launches share the multiprocessors, and one fetches its weights while the other multiplies. Of
  // more than half, a part of the next launch's blocks does.
  const double hidden = problem.constant_weights ? 1.0
                        : tile.four_warps()      ? model.four_warps_neighbour_exposed_fraction
                                                 : model.neighbour_exposed_fraction;
  tail -= model.neighbour_cycles * beside * hidden;
  // Warpgroups that take turns hide it behind each other's products, but for the last one.
  const double waves = whole_rounds + last_waves;
  const double endings =
      (tile.pingpong() ? ending + (waves - 1) * model.turn_cycles : waves * ending) + last_waves * exchange;
  const double cycles_a_us = device.clock_ghz * 1e3;
  const double compute_us =
      (mainloop + endings) / cycles_a_us * (1 + lost_to_neighbours_and_power(problem, plan, waves, model));
  const double bytes_us = problem_bytes(problem) / (model.bandwidth_fraction * device.memory_gb_per_s * 1e3);
  const double bandwidth_norm = tile.blocks_per_sm == 2 ? model.two_blocks_bandwidth_norm : model.bandwidth_norm;
  double us = norm(compute_us, bytes_us, bandwidth_norm) + tail / cycles_a_us;
  if (plan.scratch_split > 1) {
    const double sums = 8.0 * plan.scratch_split * static_cast<double>(problem.num_tokens) * problem.out_features;
    us += model.reduction_kernel_us + sums / model.scratch_bytes_per_us;
  }
  // Of eight single warps' rings a block, which have little else to do, what starts late costs more than that.
  if (tile.warp_rings() && !tile.four_warps() && counts && !fits_beside && works < slots) {
    us += model.warp_unfit_us;
    if (!problem.constant_weights) us += model.warp_unfit_exposed_us;
  }
  // Rings of their own are empty when a block of a later round starts; another block beside it hides some of that.
  if (tile.depth_split()) {
    us += (tile.blocks_per_sm == 2 ? model.two_blocks_round_us : model.own_rings_round_us) * (last_waves - 1);
  }
  if (is_exposed(problem) && tile.depth_split()) {
    us += model.depth_exposed_us * (plan.split - 1);
    if (plan.split > 1 && !plan.leaves_room()) us += model.full_clusters_exposed_us;
    if (tile.rings() == 2 && tile.blocks_per_sm == 1) us -= model.two_rings_exposed_us;
    if (tile.four_warps()) us -= model.four_warps_exposed_us;
  }
  // Two blocks a multiprocessor leave the next launch room; alone, two of four warps each do no more than one of eight.
  // (A candidate all the same: which there are, and can be forced, does not hang on where a launch stands.)
  if (problem.standalone && tile.four_warps() && plan.grid > device.num_sms) us *= 2;
  return std::max(us + quantization, 0.1);
}

std::vector<Plan> sm90_candidates(const Problem& problem, const DeviceProperties& device) {
  if (problem.standalone && problem.num_tokens > kMostLoneTokens) {
    Problem overlapping = problem;
    overlapping.standalone = false;
    return sm90_candidates(overlapping, device, kSm90Model);
  }
  return sm90_candidates(problem, device, sm90_model(problem.standalone));
}

std::vector<Plan> sm90_candidates(const Problem& problem, const DeviceProperties& device, const Sm90Model& model) {
  std::vector<Plan> plans;
  const int64_t stage_count = problem.in_features / 128;
  // Up to 96 tokens, warpgroups with rings of their own in tiles that fill the device have been faster than blocks that
  // share a tile, each with one ring: in all of 377 problems measured, by 1 to 90 %.
  const bool own_rings_are_better = problem.num_tokens <= 96 && own_rings_fill(problem, device);
  for (int index = 0; index < kSm90TileCount; ++index) {
    const Sm90Tile& tile = kSm90Tiles[index];
    if (tile.shared_memory_bytes() > device.shared_memory_per_block) continue;
    if (problem.group_size > 0 && !tile.takes_group_scales()) continue;
    // Warps dequantise for themselves: with a second tile of tokens, warpgroups do it for less.
    if (tile.warp_rings() && problem.num_tokens > tile.tokens) continue;
    // Few tokens of few inputs: rings of parts of the inputs, which walk over them side by side, have been faster in
    // all but a few problems measured, by up to a fifth; the model does not see it.
    if (!tile.depth_split() && problem.num_tokens <= 48 && stage_count <= 12) continue;
    // With group scales and the fewest tokens they have been faster for every number of inputs.
    if (!tile.depth_split() && problem.num_tokens <= 16 && problem.group_size > 0) continue;
    // The warpgroups' turns at tiles of up to 128 tokens keep shared memory busy in every cycle. In long products that
    // costs more clock than it is worth: up to a tenth against those of 160 tokens or other tiles.
    if (tile.pingpong() && tile.tokens <= 128 && multiply_adds(problem) > kLongProduct) continue;
    // Every ring of a cluster of two has to have a stage of a tile, and of fewer inputs other tiles have been faster.
    // One tile a multiprocessor is what `warp` tiles are for.
    if (tile.flows() && stage_count < 2 * tile.rings()) continue;
    if (tile.flows() && problem.out_features / tile.features() <= device.num_sms) continue;
    for (int multicast : {1, 2, 4}) {
      if (multicast > 1 && (tile.depth_split() || tile.tokens % (8 * multicast) != 0)) continue;
      if (multicast > 1 && problem.out_features <= int64_t{tile.features()} * (multicast / 2)) continue;
      // A split meets in a cluster's shared memory or in scratch, not in both.
      for (int split = 1; split <= std::min<int64_t>(kLargestSplit, stage_count); ++split) {
        for (const bool in_scratch : {false, true}) {
          if (in_scratch ? split == 1 : split * multicast > kLargestClusterSplit) continue;
          if (tile.flows() && (in_scratch || split > 2)) continue;
          if (split > 1 && !tile.depth_split() && own_rings_are_better) continue;
          if (!in_scratch && !tile.room_for_exchange(split)) continue;
          Plan plan;
          plan.family = Family::kSm90;
          plan.tile = index;
          plan.tile_name = std::string(tile.name);
          plan.tile_tokens = tile.tokens;
          plan.tile_features = tile.features();
          plan.split = in_scratch ? 1 : split;
          plan.scratch_split = in_scratch ? split : 1;
          plan.multicast = multicast;
          plan.threads = tile.threads();
          plan.shared_memory_bytes = tile.shared_memory_bytes();
          const int cluster_size = plan.split * multicast;
          const int64_t works = tile.token_tiles(problem.num_tokens) *
                                tile.feature_groups(problem.out_features, multicast) * plan.scratch_split;
          const int64_t slots = cluster_slots(device, cluster_size, tile.blocks_per_sm);
          if (slots == 0) continue;
          // More tiles than blocks: those walk over whole tiles in rounds, and if what is left is no more than a tile a
          // cluster, it is shared.
          const int64_t round = slots * split;
          const int64_t left = works % round;
          if (split > 1 && !in_scratch && tile.walks() && works > round && left > 0 && left <= slots) {
            plan.whole_rounds = static_cast<int>(works / round);
          }
          if (split > 1 && plan.whole_rounds == 0 && (works > 2 * slots || tile.pingpong() || tile.flows())) continue;
          // Where rings of their own need more blocks than run at once, and each weight more than once, a tile of more
          // tokens has been faster in every problem measured.
          if (tile.depth_split() && problem.num_tokens > tile.tokens && works > slots) continue;
          // A persistent grid walks whole tiles; otherwise split ones have a cluster each.
          const bool persistent = tile.walks() && (split == 1 || plan.whole_rounds > 0);
          const int64_t clusters = persistent ? std::min(works, slots) : works;
          if (clusters * cluster_size > kLargestExtent) continue;
          plan.grid = static_cast<int>(clusters * cluster_size);
          plan.resident_blocks = static_cast<int>(slots * cluster_size);
          plan.stages = sm90_used_stages(problem, plan);
          if (in_scratch) plan.scratch_bytes = 4 * plan.scratch_split * problem.num_tokens * problem.out_features;
          plan.estimated_us = sm90_estimated_us(problem, device, plan, model);
          plans.push_back(plan);
          if (!problem.quantizes || !tile.can_quantize(problem.num_tokens, problem.in_features)) continue;
          plan.quantizes = true;
          plan.stages = sm90_used_stages(problem, plan);
          plan.shared_memory_bytes +=
              tile.quantization_bytes(problem.num_tokens, tile.flows() ? stage_count : divide_up(stage_count, split));
          if (plan.shared_memory_bytes > device.shared_memory_per_block) continue;
          if (!tile.fits(plan.shared_memory_bytes)) continue;
          if (in_scratch) plan.scratch_bytes += 4 * problem.num_tokens;  // the scales that it finds
          plan.estimated_us = sm90_estimated_us(problem, device, plan, model);
          plans.push_back(plan);
        }
      }
    }
  }
  return plans;
}

}  // namespace marlin_qqq::plan
