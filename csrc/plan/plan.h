// What to launch: a problem and a device give a Plan. Pure host functions, no CUDA runtime and no torch,
// so that the planner runs, prints and is tested on a machine without a GPU.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace marlin_qqq::plan {

// One product: out[num_tokens, out_features] = activations[num_tokens, in_features] x weights.
struct Problem {
  int64_t num_tokens;
  int64_t out_features;  // multiple of 64
  int64_t in_features;   // multiple of 128
  int group_size;        // 128, or -1: one scale an output channel only
  // Whether the activations arrive as rows of fp16 or bf16, 16-byte aligned, and the launch includes their
  // quantisation: in a kernel of its own, or in the product's where that is faster (Plan::quantizes).
  bool quantizes = false;
  // The caller promises that no kernel still running on the device writes the packed weights, their scales or the bias:
  // the product may then fetch them while the kernel before it drains.
  bool constant_weights = false;
  // Kernels that let nothing start early run before and after the launch, as in a model a norm or attention does: it
  // has the device to itself, and nothing of it is hidden by its neighbours (sm90).
  bool standalone = false;

  bool is_empty() const { return num_tokens == 0 || out_features == 0 || in_features == 0; }
  bool operator==(const Problem&) const = default;
};

// What the planner needs to know of a GPU (cudaDeviceProp's fields, in our words).
struct DeviceProperties {
  int compute_capability;       // 80, 86, 89, 90, 100, 120: major * 10 + minor
  int num_sms;                  // multiprocessors
  int64_t l2_bytes;             // L2 cache
  int shared_memory_per_block;  // bytes a block may opt in to
  double memory_gb_per_s;       // DRAM bandwidth by its clock and width
  double clock_ghz;             // multiprocessor clock
  // Clusters of 1..8 blocks that run at once, a block a multiprocessor (sm_90): GPCs differ in size from chip to chip.
  std::array<int, 8> clusters = {};
};

// The architecture's kernel family. kNone: nothing to launch (an empty problem).
enum class Family { kNone, kSm80, kSm90 };

// A launch, fully decided. `tile` is an index into the family's tile table (see tile_table()).
struct Plan {
  Family family = Family::kNone;
  int tile = -1;
  std::string tile_name;    // the table row's name, as MARLIN_QQQ_TILE accepts it
  int tile_tokens = 0;      // tokens of one block's tile
  int tile_features = 0;    // output features of one block's tile
  int stages = 0;           // of the shared-memory pipeline that are used: what a ring has on its way at a time
  int split = 1;            // blocks that share one output tile, each with a slice of in_features (sm90: one cluster)
  int whole_rounds = 0;     // tiles that each block takes whole before the cluster's blocks share one (sm90, split > 1)
  int scratch_split = 1;    // clusters that share one output tile: their sums meet in scratch (sm90); blocks that share
                            // it at most, where their shares are uneven (sm80)
  bool quantizes = false;   // the product's kernel quantises the activations itself (sm90, Problem::quantizes)
  int multicast = 1;        // blocks of a cluster that share one activation tile (sm90)
  int grid = 0;             // blocks
  int resident_blocks = 0;  // blocks that fit on the device at once (sm90)
  int threads = 0;          // threads a block
  int shared_memory_bytes = 0;  // dynamic shared memory a block
  int64_t scratch_bytes = 0;    // device scratch the launch needs, uninitialised, 256-byte aligned
  double estimated_us = 0.0;    // the cost model's time; only differences between candidates mean anything

  // Whether another launch finds multiprocessors of its own beside this one (sm90).
  bool leaves_room() const { return 4 * grid < 3 * resident_blocks; }
  // Whether two such launches run side by side.
  bool leaves_half() const { return 2 * grid <= resident_blocks; }
};

struct TileDescription {
  Family family;
  std::string name;
  int tile_tokens;
  int tile_features;
  int stages;
  int threads;
};

// What the caller's user knows the overrides as, for messages.
struct OverrideNames {
  const char* tile = "tile";
  const char* split = "split";
};

// Picks the launch. `tile_override` (may be empty) forces a row of the table by name or one candidate by its
// candidate_name(), `split_override` (0: none) the split; both raise std::invalid_argument when there is none such for
// this problem. `family_override`: kNone lets the device decide. The tile "list" raises too, with list_candidates():
// that is how the op, whose only answer is a product, tells a program what it could launch.
Plan make_plan(const Problem& problem, const DeviceProperties& device, const std::string& tile_override = "",
               int split_override = 0, Family family_override = Family::kNone, const OverrideNames& names = {});

// Every candidate for this problem with its estimated time, best first (for `bench tune` and for tests).
std::vector<Plan> candidates(const Problem& problem, const DeviceProperties& device,
                             Family family_override = Family::kNone);

// A candidate among those of its problem: "TILE/SPLITxSCRATCH_SPLIT/MULTICAST", for example "deep256/1x3/2"; with
// "/quantizing" after it where the kernel quantises the activations.
std::string candidate_name(const Plan& plan);

// The device, and a line for every candidate with its name, best first. Read by marlin_qqq.bench.tune.
std::string list_candidates(const Problem& problem, const DeviceProperties& device,
                            Family family_override = Family::kNone);

std::vector<TileDescription> tile_table();

// Properties of a named architecture, so that plans can be looked at without a GPU: "sm_80" (A100), "sm_86", "sm_89",
// "sm_90" (H100/H200), "sm_120". Raises std::invalid_argument for other names.
DeviceProperties reference_device(const std::string& architecture);

const char* family_name(Family family);                 // "none", "sm80", "sm90"
std::string to_string(const Plan& plan);                // one line
std::string to_string(const DeviceProperties& device);  // "compute_capability=90 num_sms=132 ...", nothing rounded

}  // namespace marlin_qqq::plan
