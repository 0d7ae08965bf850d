#include "plan/plan.h"

#include <algorithm>
#include <cstdio>
#include <set>
#include <stdexcept>

#include "format/limits.h"
#include "plan/families.h"
#include "plan/sm80_tiles.h"
#include "plan/sm90_tiles.h"

namespace marlin_qqq::plan {
namespace {

void check(const Problem& p) {
  const auto refuse = [](const char* name, int64_t value, const char* allowed) {
    throw std::invalid_argument(std::string(name) + " is " + std::to_string(value) + "; allowed: " + allowed);
  };
  if (p.num_tokens < 0 || p.num_tokens > kLargestExtent) refuse("num_tokens", p.num_tokens, "0 to 2^30");
  if (!format::is_valid_out_features(p.out_features) || p.out_features > kLargestExtent) {
    refuse("out_features", p.out_features, "multiples of 64 up to 2^30");
  }
  if (!format::is_valid_in_features(p.in_features)) {
    refuse("in_features", p.in_features, "multiples of 128 below 132104 (larger sums would overflow int32)");
  }
  if (p.group_size != -1 && p.group_size != format::kGroupSize)
    refuse("group_size", p.group_size, "128, or -1 for per-channel");
}

std::string capability_name(const DeviceProperties& device) {
  return std::to_string(device.compute_capability / 10) + "." + std::to_string(device.compute_capability % 10);
}

Family family_of(const DeviceProperties& device, Family wanted) {
  if (wanted == Family::kSm90 && device.compute_capability != 90) {
    throw std::invalid_argument("the sm90 family runs on compute capability 9.0 only; this device has " +
                                capability_name(device));
  }
  if (wanted != Family::kNone) return wanted;
  if (device.compute_capability < 80) {
    throw std::invalid_argument("compute capability " + capability_name(device) +
                                " is too old; 8.0 and later are supported");
  }
  return device.compute_capability == 90 ? Family::kSm90 : Family::kSm80;
}

bool is_better(const Plan& a, const Plan& b) { return a.estimated_us < b.estimated_us; }

bool has_tile(const Plan& plan, const std::string& tile) {
  return tile.empty() || plan.tile_name == tile || candidate_name(plan) == tile;
}

// All blocks that share an output tile, in one cluster or in several.
int whole_split(const Plan& plan) { return plan.split * plan.scratch_split; }

// Says which override none of the plans has, and what they have in its place.
[[noreturn]] void refuse_overrides(const Problem& problem, const DeviceProperties& device,
                                   const std::vector<Plan>& plans, const std::string& tile, int split,
                                   const OverrideNames& names) {
  std::vector<std::string> tiles;  // best first
  std::set<int> splits;            // of the tile asked for
  for (const Plan& plan : plans) {
    if (std::find(tiles.begin(), tiles.end(), plan.tile_name) == tiles.end()) tiles.push_back(plan.tile_name);
    if (has_tile(plan, tile)) splits.insert(whole_split(plan));
  }
  std::string text, allowed;
  if (splits.empty()) {
    text = std::string(names.tile) + " is '" + tile + "'";
    for (const std::string& name : tiles) allowed += name + ", ";
    allowed += "or the name of a candidate with one of them";
  } else {
    text = std::string(names.split) + " is " + std::to_string(split);
    if (!tile.empty()) text += " with " + std::string(names.tile) + " '" + tile + "'";
    for (const int blocks : splits) allowed += (allowed.empty() ? "" : ", ") + std::to_string(blocks);
  }
  throw std::invalid_argument(text + "; allowed for num_tokens " + std::to_string(problem.num_tokens) +
                              ", out_features " + std::to_string(problem.out_features) + ", in_features " +
                              std::to_string(problem.in_features) + " on compute capability " +
                              capability_name(device) + ": " + allowed);
}

}  // namespace

std::vector<Plan> candidates(const Problem& problem, const DeviceProperties& device, Family family_override) {
  check(problem);
  if (problem.is_empty()) return {};
  std::vector<Plan> plans = family_of(device, family_override) == Family::kSm90 ? sm90_candidates(problem, device)
                                                                                : sm80_candidates(problem, device);
  std::stable_sort(plans.begin(), plans.end(), is_better);
  return plans;
}

Plan make_plan(const Problem& problem, const DeviceProperties& device, const std::string& tile_override,
               int split_override, Family family_override, const OverrideNames& names) {
  if (tile_override == "list") throw std::invalid_argument(list_candidates(problem, device, family_override));
  // A tile's name says its family.
  if (!tile_override.empty() && family_override == Family::kNone) {
    const std::string tile_name = tile_override.substr(0, tile_override.find('/'));
    for (const TileDescription& row : tile_table()) {
      if (row.name == tile_name) family_override = row.family;
    }
  }
  const std::vector<Plan> plans = candidates(problem, device, family_override);
  if (problem.is_empty()) return {};
  for (const Plan& plan : plans) {
    if (has_tile(plan, tile_override) && (split_override == 0 || whole_split(plan) == split_override)) return plan;
  }
  refuse_overrides(problem, device, plans, tile_override, split_override, names);
}

std::string candidate_name(const Plan& plan) {
  return plan.tile_name + "/" + std::to_string(plan.split) + "x" + std::to_string(plan.scratch_split) + "/" +
         std::to_string(plan.multicast) + (plan.quantizes ? "/quantizing" : "");
}

std::string list_candidates(const Problem& problem, const DeviceProperties& device, Family family_override) {
  std::string text = "device " + to_string(device) + "\n";
  for (const Plan& plan : candidates(problem, device, family_override)) {
    text += "candidate " + candidate_name(plan) + " " + to_string(plan) + "\n";
  }
  return text;
}

std::vector<TileDescription> tile_table() {
  std::vector<TileDescription> rows;
  for (const Sm80Tile& tile : kSm80Tiles) {
    rows.push_back(
        {Family::kSm80, std::string(tile.name), tile.tokens(), tile.features(), tile.stages, tile.threads()});
  }
  for (const Sm90Tile& tile : kSm90Tiles) {
    rows.push_back({Family::kSm90, std::string(tile.name), tile.tokens, tile.features(), tile.stages, tile.threads()});
  }
  return rows;
}

DeviceProperties reference_device(const std::string& architecture) {
  constexpr int64_t kMiB = 1 << 20;
  if (architecture == "sm_80") return {80, 108, 40 * kMiB, 166912, 2039, 1.41};  // A100 80 GB
  if (architecture == "sm_86") return {86, 84, 6 * kMiB, 101376, 768, 1.70};     // A40 / RTX 3090 class
  if (architecture == "sm_89") return {89, 142, 96 * kMiB, 101376, 864, 2.49};   // L40S
  if (architecture == "sm_90") {
    return {90, 132, 60 * kMiB, 232448, 4814, 1.98, {132, 66, 39, 30, 22, 17, 15, 15}};  // H200
  }
  if (architecture == "sm_120") return {120, 188, 128 * kMiB, 101376, 1792, 2.4};  // RTX PRO 6000
  throw std::invalid_argument("device is '" + architecture + "'; allowed: sm_80, sm_86, sm_89, sm_90, sm_120");
}

const char* family_name(Family family) {
  return family == Family::kSm80 ? "sm80" : family == Family::kSm90 ? "sm90" : "none";
}

std::string to_string(const Plan& plan) {
  if (plan.family == Family::kNone) return "nothing to launch";
  const std::string rounds =
      plan.whole_rounds > 0 ? " after " + std::to_string(plan.whole_rounds) + " rounds of whole tiles" : "";
  char text[320];
  std::snprintf(
      text, sizeof(text),
      "%s %s%s: tile %d tokens x %d features, %d stages, split %d x %d%s, multicast %d, grid %d x %d threads, %d bytes "
      "of shared memory, %lld bytes of scratch, estimated %.1f us",
      family_name(plan.family), plan.tile_name.c_str(), plan.quantizes ? ", quantizing" : "", plan.tile_tokens,
      plan.tile_features, plan.stages, plan.split, plan.scratch_split, rounds.c_str(), plan.multicast, plan.grid,
      plan.threads, plan.shared_memory_bytes, static_cast<long long>(plan.scratch_bytes), plan.estimated_us);
  return text;
}

std::string to_string(const DeviceProperties& device) {
  char text[256];
  std::snprintf(text, sizeof(text),
                "compute_capability=%d num_sms=%d l2_bytes=%lld shared_memory_per_block=%d memory_gb_per_s=%.17g "
                "clock_ghz=%.17g clusters=",
                device.compute_capability, device.num_sms, static_cast<long long>(device.l2_bytes),
                device.shared_memory_per_block, device.memory_gb_per_s, device.clock_ghz);
  std::string line = text;
  for (const int clusters : device.clusters) line += std::to_string(clusters) + ",";
  line.pop_back();
  return line;
}

}  // namespace marlin_qqq::plan
