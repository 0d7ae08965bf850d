// The planner: every problem gets a launch that the device can run, the same one every time, and says what it is.
#include "plan/plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "format/divide_up.h"
#include "plan/families.h"
#include "plan/sm80_tiles.h"
#include "plan/sm90_tiles.h"

namespace marlin_qqq {
namespace {

using plan::DeviceProperties;
using plan::Family;
using plan::Plan;
using plan::Problem;

constexpr const char* kArchitectures[] = {"sm_80", "sm_86", "sm_89", "sm_90", "sm_120"};
constexpr int64_t kTokens[] = {1, 2, 7, 8, 16, 17, 33, 64, 100, 128, 256, 511, 1024, 4096, 16384, 131072};
constexpr int64_t kOutFeatures[] = {64, 128, 192, 1024, 4096, 5120, 11008, 28672, 151936};
constexpr int64_t kInFeatures[] = {128, 256, 384, 4096, 8192, 21760, 132096};

std::string describe(const Problem& p, const std::string& architecture) {
  return architecture + ": " + std::to_string(p.num_tokens) + " tokens, " + std::to_string(p.out_features) +
         " out_features, " + std::to_string(p.in_features) + " in_features, group_size " + std::to_string(p.group_size);
}

void expect_runnable(const Plan& plan, const Problem& problem, const DeviceProperties& device) {
  EXPECT_NE(plan.family, Family::kNone);
  EXPECT_GT(plan.grid, 0);
  EXPECT_TRUE(plan.threads >= 32 && plan.threads <= 1024 && plan.threads % 32 == 0) << plan.threads;
  EXPECT_GE(plan.stages, 2);
  EXPECT_GE(plan.split, 1);
  EXPECT_GE(plan.multicast, 1);
  EXPECT_TRUE(plan.shared_memory_bytes > 0 && plan.shared_memory_bytes <= device.shared_memory_per_block)
      << plan.shared_memory_bytes;
  EXPECT_GE(plan.scratch_bytes, 0);
  EXPECT_GT(plan.estimated_us, 0.0);
  EXPECT_LT(plan.estimated_us, 1e9);
  EXPECT_GT(plan.tile_tokens, 0);
  EXPECT_EQ(plan.tile_features % 64, 0);
  EXPECT_LE(plan.split, problem.in_features / 64) << "a block without inputs";
  // The tile is the table's row of that name.
  bool found = false;
  for (const plan::TileDescription& row : plan::tile_table()) {
    if (row.family == plan.family && row.name == plan.tile_name) {
      found = true;
      EXPECT_EQ(row.tile_tokens, plan.tile_tokens);
      EXPECT_EQ(row.tile_features, plan.tile_features);
      EXPECT_LE(plan.stages, row.stages);  // a Hopper launch may use a part of them
      if (plan.family == Family::kSm80) {
        EXPECT_EQ(plan.stages, row.stages);
      }
      EXPECT_EQ(row.threads, plan.threads);
    }
  }
  EXPECT_TRUE(found) << plan.tile_name;
}

class EveryArchitecture : public testing::TestWithParam<const char*> {};
INSTANTIATE_TEST_SUITE_P(Every, EveryArchitecture, testing::ValuesIn(kArchitectures),
                         [](const auto& info) { return std::string(info.param); });

TEST_P(EveryArchitecture, EveryProblemGetsARunnablePlan) {
  const DeviceProperties device = plan::reference_device(GetParam());
  for (const int64_t num_tokens : kTokens) {
    for (const int64_t out_features : kOutFeatures) {
      for (const int64_t in_features : kInFeatures) {
        for (const int group_size : {-1, 128}) {
          const Problem problem{num_tokens, out_features, in_features, group_size};
          SCOPED_TRACE(describe(problem, GetParam()));
          Plan chosen;
          ASSERT_NO_THROW(chosen = plan::make_plan(problem, device));
          expect_runnable(chosen, problem, device);
          if (testing::Test::HasFailure()) return;  // one report is enough
        }
      }
    }
  }
}

// A small part of a large GPU (a MIG slice), or a GPU with less shared memory, still gets a plan.
TEST_P(EveryArchitecture, SmallerDevicesGetAPlanToo) {
  DeviceProperties device = plan::reference_device(GetParam());
  for (const int num_sms : {1, 7, 14}) {
    device.num_sms = num_sms;
    for (const int64_t num_tokens : {1, 64, 2048}) {
      const Problem problem{num_tokens, 4096, 4096, 128};
      SCOPED_TRACE(describe(problem, GetParam()));
      expect_runnable(plan::make_plan(problem, device), problem, device);
    }
  }
}

TEST_P(EveryArchitecture, CandidatesAreRunnableAndSorted) {
  const DeviceProperties device = plan::reference_device(GetParam());
  for (const int64_t num_tokens : {1, 48, 700}) {
    const Problem problem{num_tokens, 5120, 4096, 128};
    const std::vector<Plan> candidates = plan::candidates(problem, device);
    ASSERT_FALSE(candidates.empty());
    for (size_t i = 0; i < candidates.size(); ++i) {
      SCOPED_TRACE(plan::to_string(candidates[i]));
      expect_runnable(candidates[i], problem, device);
      if (i > 0) {
        EXPECT_LE(candidates[i - 1].estimated_us, candidates[i].estimated_us);
      }
    }
    EXPECT_EQ(plan::to_string(candidates[0]), plan::to_string(plan::make_plan(problem, device)));
  }
}

TEST_P(EveryArchitecture, TheSameProblemGetsTheSamePlan) {
  const DeviceProperties device = plan::reference_device(GetParam());
  for (const int64_t num_tokens : kTokens) {
    const Problem problem{num_tokens, 4096, 11008, -1};
    EXPECT_EQ(plan::to_string(plan::make_plan(problem, device)), plan::to_string(plan::make_plan(problem, device)));
  }
}

TEST_P(EveryArchitecture, OverridesAreObeyed) {
  const DeviceProperties device = plan::reference_device(GetParam());
  const Problem problem{96, 4096, 4096, 128};
  for (const Plan& candidate : plan::candidates(problem, device)) {
    // The override counts all blocks that share an output tile, in one cluster or in several.
    const int split = candidate.split * candidate.scratch_split;
    const Plan forced = plan::make_plan(problem, device, candidate.tile_name, split);
    EXPECT_EQ(forced.tile_name, candidate.tile_name);
    EXPECT_EQ(forced.split * forced.scratch_split, split);
  }
}

TEST_P(EveryArchitecture, ACandidatesNameForcesItAndNoOther) {
  const DeviceProperties device = plan::reference_device(GetParam());
  const Problem problem{300, 4096, 4096, -1};
  std::set<std::string> names;
  for (const Plan& candidate : plan::candidates(problem, device)) {
    const std::string name = plan::candidate_name(candidate);
    EXPECT_TRUE(names.insert(name).second) << name;
    EXPECT_EQ(plan::to_string(plan::make_plan(problem, device, name)), plan::to_string(candidate));
  }
}

// The text of the error that `call` raises; empty if it raises none.
template <typename Call>
std::string refusal(Call call) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

TEST_P(EveryArchitecture, OverridesThatCannotRunAreRefusedByName) {
  const DeviceProperties device = plan::reference_device(GetParam());
  const Problem problem{16, 4096, 4096, 128};
  EXPECT_NE(refusal([&] { plan::make_plan(problem, device, "no_such_tile"); }).find("no_such_tile"), std::string::npos);
  EXPECT_NE(refusal([&] { plan::make_plan(problem, device, "", 12345); }).find("12345"), std::string::npos);
  if (device.compute_capability != 90) {
    EXPECT_NE(refusal([&] { plan::make_plan(problem, device, "", 0, Family::kSm90); }), "");
  }
}

TEST(Plan, TheTileListTellsTheDeviceAndEveryCandidate) {
  const DeviceProperties device = plan::reference_device("sm_90");
  const Problem problem{16, 4096, 4096, 128};
  const std::string text = refusal([&] { plan::make_plan(problem, device, "list"); });
  EXPECT_EQ(text.find("device compute_capability=90 num_sms=132 l2_bytes=62914560 shared_memory_per_block=232448 "
                      "memory_gb_per_s=4814 clock_ghz=1.98 clusters=132,66,39,30,22,17,15,15\n"),
            0u)
      << text;
  size_t from = 0;
  for (const Plan& candidate : plan::candidates(problem, device)) {
    const std::string line = "\ncandidate " + plan::candidate_name(candidate) + " " + plan::to_string(candidate) + "\n";
    from = text.find(line, from);
    ASSERT_NE(from, std::string::npos) << line;
  }
}

TEST(Plan, ProblemsOutsideTheFormatAreRefusedWithTheirValue) {
  const DeviceProperties device = plan::reference_device("sm_90");
  const struct {
    Problem problem;
    const char* argument;
    const char* value;
  } cases[] = {{{-1, 64, 128, -1}, "num_tokens", "-1"},
               {{1, 96, 128, -1}, "out_features", "96"},
               {{1, 64, 192, -1}, "in_features", "192"},
               {{1, 64, 132224, -1}, "in_features", "132224"},
               {{1, 64, 128, 64}, "group_size", "64"}};
  for (const auto& c : cases) {
    const std::string text = refusal([&] { plan::make_plan(c.problem, device); });
    EXPECT_NE(text.find(c.argument), std::string::npos) << text;
    EXPECT_NE(text.find(c.value), std::string::npos) << text;
  }
}

TEST(Plan, OldDevicesAndUnknownNamesAreRefused) {
  DeviceProperties device = plan::reference_device("sm_80");
  device.compute_capability = 75;
  EXPECT_NE(refusal([&] { plan::make_plan({1, 64, 128, -1}, device); }).find("7.5"), std::string::npos);
  EXPECT_NE(refusal([] { plan::reference_device("sm_70"); }).find("sm_70"), std::string::npos);
}

TEST(Plan, EmptyProblemsLaunchNothing) {
  const DeviceProperties device = plan::reference_device("sm_90");
  for (const Problem& problem : {Problem{0, 64, 128, -1}, Problem{5, 0, 128, -1}}) {
    const Plan plan = plan::make_plan(problem, device);
    EXPECT_EQ(plan.family, Family::kNone);
    EXPECT_EQ(plan.grid, 0);
  }
}

TEST(Plan, TheTextNamesTheLaunch) {
  const Plan chosen = plan::make_plan({64, 4096, 4096, 128}, plan::reference_device("sm_90"));
  const std::string text = plan::to_string(chosen);
  EXPECT_NE(text.find(chosen.tile_name), std::string::npos) << text;
  EXPECT_NE(text.find(plan::family_name(chosen.family)), std::string::npos) << text;
  EXPECT_NE(text.find(std::to_string(chosen.grid)), std::string::npos) << text;
  EXPECT_EQ(text.find('\n'), std::string::npos);
}

TEST(Plan, TileTableHasDistinctNames) {
  std::set<std::string> names;
  for (const plan::TileDescription& row : plan::tile_table()) {
    EXPECT_TRUE(names.insert(row.name).second) << row.name;
    EXPECT_GT(row.tile_tokens, 0);
    EXPECT_GT(row.tile_features, 0);
  }
  EXPECT_GE(names.size(), 2u);
}

// A few problems that between them have every kind of tile, split and mode among their candidates.
constexpr Problem kModelProblems[] = {{1, 4096, 4096, -1},
                                      {16, 4096, 4096, 128},
                                      {64, 8192, 21760, 128},
                                      {2048, 4096, 14336, -1},
                                      {1, 2560, 4096, 128, /*quantizes=*/false, /*constant_weights=*/true},
                                      {16, 12288, 4096, -1},
                                      {16, 12288, 4096, -1, /*quantizes=*/false, /*constant_weights=*/true},
                                      {16, 12288, 4096, 128, /*quantizes=*/false, /*constant_weights=*/true}};

TEST(Sm90Model, ItsDefaultValuesAreThePlanners) {
  const DeviceProperties device = plan::reference_device("sm_90");
  for (const Problem& problem : kModelProblems) {
    const std::vector<Plan> plans = plan::sm90_candidates(problem, device);
    const std::vector<Plan> again = plan::sm90_candidates(problem, device, plan::Sm90Model{});
    ASSERT_EQ(plans.size(), again.size());
    for (size_t i = 0; i < plans.size(); ++i) {
      EXPECT_EQ(plan::to_string(plans[i]), plan::to_string(again[i]));
      EXPECT_EQ(plans[i].estimated_us, plan::sm90_estimated_us(problem, device, plans[i], plan::kSm90Model));
    }
  }
}

TEST(Sm90Model, EveryConstantMovesATime) {
  const DeviceProperties device = plan::reference_device("sm_90");
  for (const plan::Sm90Constant& constant : plan::kSm90Constants) {
    plan::Sm90Model model;
    model.*constant.value *= 2;
    bool moved = false;
    for (const bool standalone : {false, true}) {
      for (Problem problem : kModelProblems) {
        problem.standalone = standalone;
        for (const Plan& candidate : plan::sm90_candidates(problem, device, plan::kSm90Model)) {
          const double us = plan::sm90_estimated_us(problem, device, candidate, model);
          EXPECT_TRUE(std::isfinite(us) && us > 0) << constant.name;
          moved = moved || us != candidate.estimated_us;
        }
      }
    }
    EXPECT_TRUE(moved) << constant.name;
  }
}

// A warp tile is for one tile of tokens (sm90_candidates.cpp says why).
TEST(Sm90Candidates, WarpTilesHoldAllTokens) {
  const DeviceProperties device = plan::reference_device("sm_90");
  for (const int64_t num_tokens : {1, 8, 9, 24, 25, 32, 33, 64}) {
    bool any = false;
    for (const Plan& candidate : plan::sm90_candidates({num_tokens, 4096, 4096, 128}, device)) {
      if (candidate.tile_name.rfind("warp", 0) != 0) continue;
      any = true;
      EXPECT_GE(candidate.tile_tokens, num_tokens) << candidate.tile_name;
    }
    EXPECT_EQ(any, num_tokens <= 32) << num_tokens;
  }
}

// Tiles whose rings take parts of the inputs do not dequantise each weight more than once in blocks that start one
// after the other.
TEST(Sm90Candidates, SeveralTilesOfTokensInSeveralWavesAreForSharedRings) {
  const DeviceProperties device = plan::reference_device("sm_90");
  int several_tiles = 0;
  for (const int64_t num_tokens : {65, 256, 1024}) {
    for (const int64_t out_features : {1024, 4096, 12288}) {
      for (const Plan& candidate : plan::sm90_candidates({num_tokens, out_features, 4096, 128}, device)) {
        const plan::Sm90Tile& tile = plan::kSm90Tiles[candidate.tile];
        if (!tile.depth_split() || num_tokens <= tile.tokens) continue;
        ++several_tiles;
        EXPECT_LE(candidate.grid, candidate.resident_blocks) << candidate.tile_name;
      }
    }
  }
  EXPECT_GT(several_tiles, 0);
}

TEST(Sm90Candidates, FewTokensOfFewInputsAreForRingsOfPartsOfTheInputs) {
  const DeviceProperties device = plan::reference_device("sm_90");
  const auto shares_a_ring = [&device](int64_t num_tokens, int64_t in_features) {
    const std::vector<Plan> candidates = plan::sm90_candidates({num_tokens, 8192, in_features, -1}, device);
    EXPECT_FALSE(candidates.empty());
    return std::ranges::any_of(candidates,
                               [](const Plan& candidate) { return !plan::kSm90Tiles[candidate.tile].depth_split(); });
  };
  EXPECT_FALSE(shares_a_ring(48, 1536));
  EXPECT_TRUE(shares_a_ring(49, 1536));
  EXPECT_TRUE(shares_a_ring(48, 1664));
}

TEST(Sm90Candidates, TheFewestTokensWithGroupScalesAreForRingsOfPartsOfTheInputs) {
  const DeviceProperties device = plan::reference_device("sm_90");
  const auto shares_a_ring = [&device](int64_t num_tokens, int group_size) {
    const std::vector<Plan> candidates = plan::sm90_candidates({num_tokens, 37888, 3584, group_size}, device);
    EXPECT_FALSE(candidates.empty());
    return std::ranges::any_of(candidates,
                               [](const Plan& candidate) { return !plan::kSm90Tiles[candidate.tile].depth_split(); });
  };
  EXPECT_FALSE(shares_a_ring(16, 128));
  EXPECT_TRUE(shares_a_ring(17, 128));
  EXPECT_TRUE(shares_a_ring(16, -1));
}

// A launch that is forced by name must be there wherever it stands: the first one of a captured graph stands alone.
TEST(Sm90Candidates, WhichThereAreDoesNotHangOnWhereALaunchStands) {
  const DeviceProperties device = plan::reference_device("sm_90");
  const auto names = [&device](Problem problem, bool standalone) {
    problem.standalone = standalone;
    std::set<std::string> found;
    for (const Plan& candidate : plan::sm90_candidates(problem, device)) found.insert(plan::candidate_name(candidate));
    return found;
  };
  for (const int64_t num_tokens : {1, 32, 64, 512, 2048}) {
    for (const int64_t out_features : {1024, 8192, 24576}) {
      for (const int group_size : {-1, 128}) {
        const Problem problem = {num_tokens, out_features, 4096, group_size};
        EXPECT_EQ(names(problem, true), names(problem, false)) << num_tokens << " " << out_features;
      }
    }
  }
}

TEST(Sm90Candidates, SharedRingsAreNotSplitWhereOwnRingsFillTheDevice) {
  const DeviceProperties device = plan::reference_device("sm_90");
  const auto splits = [&device](int64_t num_tokens, int64_t out_features) {
    return std::ranges::any_of(
        plan::sm90_candidates({num_tokens, out_features, 14336, 128}, device), [](const Plan& candidate) {
          return candidate.split * candidate.scratch_split > 1 && !plan::kSm90Tiles[candidate.tile].depth_split();
        });
  };
  for (const int64_t out_features : {8192, 4096, 3584}) {  // 128, 2 x 64 and 2 x 56 of 132 multiprocessors
    EXPECT_FALSE(splits(17, out_features)) << out_features;
    EXPECT_FALSE(splits(96, out_features)) << out_features;
    EXPECT_TRUE(splits(97, out_features)) << out_features;
  }
  for (const int64_t out_features : {5120, 16384}) EXPECT_TRUE(splits(96, out_features)) << out_features;
}

TEST(Sm90Candidates, RingsFlowOnWhereThereAreMoreTilesThanMultiprocessors) {
  const DeviceProperties device = plan::reference_device("sm_90");
  const auto flows = [&device](int64_t num_tokens, int64_t out_features, int64_t in_features) {
    std::vector<Plan> found;
    for (const Plan& candidate : plan::sm90_candidates({num_tokens, out_features, in_features, 128}, device)) {
      if (plan::kSm90Tiles[candidate.tile].flows()) found.push_back(candidate);
    }
    return found;
  };
  EXPECT_TRUE(flows(1, 64 * device.num_sms, 4096).empty());
  EXPECT_TRUE(flows(1, 12288, 1920).empty());
  EXPECT_TRUE(flows(33, 12288, 4096).empty());
  for (const int64_t tiles : {133, 192, 264, 265, 330, 331, 395}) {
    const std::vector<Plan> found = flows(1, 64 * tiles, 4096);
    EXPECT_FALSE(found.empty());
    for (const Plan& candidate : found) {
      EXPECT_EQ(candidate.grid, device.num_sms) << candidate.tile_name;
      // Clusters share what is left after whole rounds, if it is a tile for each at most.
      const int64_t left = tiles % device.num_sms;
      EXPECT_TRUE(candidate.split == 1 || (left > 0 && left <= device.num_sms / 2)) << tiles;
      EXPECT_EQ(candidate.whole_rounds, candidate.split > 1 ? tiles / device.num_sms : 0);
    }
    const bool any_shares = std::ranges::any_of(found, [](const Plan& candidate) { return candidate.split > 1; });
    EXPECT_EQ(any_shares, tiles % device.num_sms > 0 && tiles % device.num_sms <= device.num_sms / 2) << tiles;
  }
}

// Constant weights are fetched by blocks of the next launch where this one's are done; clusters are not done earlier.
TEST(Sm90Candidates, ConstantWeightsMakeUpForAnUnevenLastRound) {
  DeviceProperties device = plan::reference_device("sm_90");
  device.memory_gb_per_s = 3352;  // of an H100, where it was measured
  Problem problem{8, 12288, 4096, -1};
  EXPECT_EQ(plan::candidate_name(plan::make_plan(problem, device)), "flow8/2x1/1");
  problem.constant_weights = true;
  EXPECT_EQ(plan::candidate_name(plan::make_plan(problem, device)), "flow8/1x1/1");
}

TEST(Sm90Candidates, LongProductsTakeNoTurnsAtSmallTiles) {
  const DeviceProperties device = plan::reference_device("sm_90");
  const auto has = [&device](std::string_view tile, int64_t num_tokens) {
    return std::ranges::any_of(plan::sm90_candidates({num_tokens, 28672, 4096, -1}, device),
                               [tile](const Plan& candidate) { return candidate.tile_name == tile; });
  };
  EXPECT_TRUE(has("pingpong128", 2048));
  EXPECT_FALSE(has("pingpong128", 4096));
  EXPECT_TRUE(has("pingpong160", 4096));
}

// At the power limit, two blocks fetch activations once for both, if there are several rounds of them.
TEST(Sm90Candidates, LongProductsOfManyTokensShareActivations) {
  const DeviceProperties device = plan::reference_device("sm_90");
  const auto chosen = [&device](int64_t num_tokens, int64_t out_features, int64_t in_features, int group_size) {
    return plan::make_plan({num_tokens, out_features, in_features, group_size}, device);
  };
  for (const int group_size : {-1, 128}) {
    for (const auto& [num_tokens, out_features, in_features] :
         {std::array<int64_t, 3>{4096, 8192, 21760}, {1024, 28672, 4096}, {4096, 4096, 4096}, {2048, 14336, 4096}}) {
      const Plan plan = chosen(num_tokens, out_features, in_features, group_size);
      EXPECT_EQ(plan.multicast, 2) << plan::to_string(plan);
      EXPECT_FALSE(plan::kSm90Tiles[plan.tile].pingpong()) << plan::to_string(plan);
    }
    EXPECT_EQ(chosen(1024, 4096, 14336, group_size).multicast, 1);  // one round
    EXPECT_EQ(chosen(512, 28672, 4096, group_size).multicast, 1);   // few tokens
  }
}

// The reduction adds what every block between the first and the last of a tile has left in scratch: a block without a
// part of the shared tiles would leave nothing there.
TEST_P(EveryArchitecture, BlocksThatShareTilesAllHaveAPart) {
  const DeviceProperties device = plan::reference_device(GetParam());
  int num_uneven = 0;
  for (const int64_t out_features : {512, 2048, 2560, 4096, 5120, 12288, 22016}) {
    for (const int64_t in_features : {256, 512, 2048, 4096}) {
      for (int64_t num_tokens = 1; num_tokens <= 1920; num_tokens += num_tokens < 64 ? 9 : 61) {
        const Problem problem{num_tokens, out_features, in_features, 128};
        for (const Plan& candidate : plan::candidates(problem, device, Family::kSm80)) {
          if (candidate.split * candidate.scratch_split == 1) continue;
          num_uneven += candidate.scratch_split > 1;
          const int64_t tiles =
              divide_up(num_tokens, candidate.tile_tokens) * divide_up(out_features, candidate.tile_features);
          const int64_t units = in_features / plan::kSm80Tiles[candidate.tile].depth;
          const int64_t shared_tiles = tiles - plan::sm80_whole_tiles(tiles, candidate.grid, /*shares=*/true);
          ASSERT_GE(shared_tiles * units, candidate.grid)
              << describe(problem, GetParam()) << ": " << plan::to_string(candidate);
        }
      }
    }
  }
  EXPECT_GT(num_uneven, 100);
}

// More tiles than blocks: whole rounds and one in which every cluster has a tile at most are all of the tiles.
TEST(Sm90Candidates, BlocksShareOnlyTheLastOfTheirTiles) {
  const DeviceProperties device = plan::reference_device("sm_90");
  std::set<int> tiles, multicasts, splits;
  for (const int group_size : {-1, 128}) {
    for (const int64_t num_tokens : {17, 64, 200, 512, 1000, 4096}) {
      for (const int64_t out_features : {4096, 5120, 12288, 18944, 28672, 37888}) {
        const Problem problem{num_tokens, out_features, 4096, group_size};
        for (const Plan& candidate : plan::sm90_candidates(problem, device)) {
          if (candidate.whole_rounds == 0) continue;
          expect_runnable(candidate, problem, device);
          EXPECT_GT(candidate.split, 1);
          EXPECT_EQ(candidate.scratch_split, 1);
          EXPECT_EQ(candidate.grid, candidate.resident_blocks);
          const int64_t features = int64_t{candidate.tile_features} * candidate.multicast;
          const int64_t works = (num_tokens + candidate.tile_tokens - 1) / candidate.tile_tokens *
                                ((out_features + features - 1) / features);
          const int64_t left = works - candidate.whole_rounds * (candidate.grid / candidate.multicast);
          EXPECT_GT(left, 0) << plan::to_string(candidate);
          EXPECT_LE(left, candidate.grid / (candidate.split * candidate.multicast)) << plan::to_string(candidate);
          tiles.insert(candidate.tile);
          multicasts.insert(candidate.multicast);
          splits.insert(candidate.split);
        }
      }
    }
  }
  EXPECT_GT(tiles.size(), 15u);
  EXPECT_GT(multicasts.size(), 1u);
  EXPECT_GT(splits.size(), 2u);
}

// Warpgroups that take turns take whole tiles, per-channel, and share one at most.
TEST(Sm90Candidates, TurnsAreTakenAtWholeTilesPerChannel) {
  const DeviceProperties device = plan::reference_device("sm_90");
  int turns = 0;
  for (const int group_size : {-1, 128}) {
    for (const int64_t num_tokens : {1, 64, 1000}) {
      for (const Plan& candidate : plan::sm90_candidates({num_tokens, 28672, 4096, group_size}, device)) {
        if (!plan::kSm90Tiles[candidate.tile].pingpong()) continue;
        ++turns;
        EXPECT_EQ(group_size, -1) << candidate.tile_name;
        EXPECT_EQ(candidate.scratch_split, 1) << candidate.tile_name;
        EXPECT_TRUE(candidate.split == 1 || candidate.whole_rounds > 0) << candidate.tile_name;
        EXPECT_LE(candidate.grid, device.num_sms) << candidate.tile_name;
      }
    }
  }
  EXPECT_GT(turns, 0);
}

TEST(Plan, LeavesRoomForAnotherLaunchWhereAQuarterOfTheDeviceIsFree) {
  Plan plan;
  plan.resident_blocks = 132;
  plan.grid = 98;
  EXPECT_TRUE(plan.leaves_room());
  plan.grid = 99;
  EXPECT_FALSE(plan.leaves_room());
  EXPECT_FALSE(plan.leaves_half());
  plan.grid = 66;
  EXPECT_TRUE(plan.leaves_half());
  plan.grid = 67;
  EXPECT_FALSE(plan.leaves_half());
}

TEST(Sm90Model, WhatRingsOfTheirOwnCostWithoutConstantWeights) {
  const DeviceProperties device = plan::reference_device("sm_90");
  plan::Sm90Model free;
  free.depth_exposed_us = free.full_clusters_exposed_us = free.two_rings_exposed_us = 0;
  free.four_warps_exposed_us = 0;
  const plan::Sm90Model& model = plan::kSm90Model;
  for (const bool constant_weights : {false, true}) {
    const Problem problem = {16, 2048, 8192, 128, /*quantizes=*/false, constant_weights};
    for (const Plan& candidate : plan::sm90_candidates(problem, device)) {
      double more = 0;
      if (!constant_weights && plan::kSm90Tiles[candidate.tile].depth_split()) {
        more = model.depth_exposed_us * (candidate.split - 1);
        if (candidate.split > 1 && !candidate.leaves_room()) more += model.full_clusters_exposed_us;
        if (candidate.tile_name.starts_with("tall")) more -= model.two_rings_exposed_us;
        if (candidate.tile_name.starts_with("pair")) more -= model.four_warps_exposed_us;
      }
      EXPECT_NEAR(plan::sm90_estimated_us(problem, device, candidate, model) -
                      plan::sm90_estimated_us(problem, device, candidate, free),
                  more, 1e-9)
          << plan::candidate_name(candidate);
    }
  }
}

TEST(Sm90Model, WhatALaterRoundOfTwoBlocksAMultiprocessorCosts) {
  const DeviceProperties device = plan::reference_device("sm_90");
  plan::Sm90Model free;
  free.two_blocks_round_us = 0;
  const auto rounds_after_the_first = [&](std::string_view tile, int64_t out_features) {
    const Problem problem = {16, out_features, 4096, 128};
    for (const Plan& candidate : plan::sm90_candidates(problem, device)) {
      if (plan::candidate_name(candidate) != std::string(tile) + "/1x1/1") continue;
      return (plan::sm90_estimated_us(problem, device, candidate, plan::kSm90Model) -
              plan::sm90_estimated_us(problem, device, candidate, free)) /
             plan::kSm90Model.two_blocks_round_us;
    }
    return -1.0;
  };
  EXPECT_NEAR(rounds_after_the_first("stream16", 128 * 264), 0, 1e-9);
  EXPECT_NEAR(rounds_after_the_first("stream16", 128 * 265), 1, 1e-9);
  EXPECT_NEAR(rounds_after_the_first("pair16", 64 * 264), 0, 1e-9);
  EXPECT_NEAR(rounds_after_the_first("pair16", 64 * 529), 2, 1e-9);
  EXPECT_NEAR(rounds_after_the_first("flow16", 64 * 529), 0, 1e-9) << "one block a multiprocessor";
}

TEST(Sm90UsedStages, AsManyAsKeepTheMemoryBusBusy) {
  Plan plan;
  plan.resident_blocks = 132;
  int64_t in_features = 8192;
  const auto stages = [&](std::string_view tile, int group_size, int grid = 128, bool constant_weights = false) {
    plan.tile = plan::sm90_tile_index(tile);
    plan.grid = grid;
    return plan::sm90_used_stages({16, 8192, in_features, group_size, /*quantizes=*/false, constant_weights}, plan);
  };
  EXPECT_EQ(stages("narrow16", 128), 5) << "4 rings of 2 KB of activations, 4 KB of weights and 128 bytes of scales";
  EXPECT_EQ(stages("narrow48", 128), 4);
  EXPECT_EQ(stages("wide64", -1), 6) << "one ring of 8 and 16 KB";
  EXPECT_EQ(stages("stream8", 128), 4) << "two blocks a multiprocessor";
  EXPECT_EQ(stages("flow32", -1), 3) << "never two";
  EXPECT_EQ(stages("narrow16", 128, 128, true), 8) << "constant weights";
  in_features = 16384;
  EXPECT_EQ(stages("narrow16", 128, 128, true), 5) << "32 stages a ring";
  EXPECT_EQ(stages("narrow64", 128, 128, true), 4);
  EXPECT_EQ(stages("stream16", -1, 128, true), 3);
  EXPECT_EQ(stages("warp16", 128, 128, true), 4) << "16 stages a ring";
  in_features = 24576;
  EXPECT_EQ(stages("warp16", 128, 128, true), 3) << "24 stages a ring";
  EXPECT_EQ(stages("flow16", 128, 132, true), 4) << "whose rings flow on";
  EXPECT_EQ(stages("narrow16", 128, 133), 8) << "a second round";
  EXPECT_EQ(stages("wide64", -1, 133), 6) << "blocks that walk over tiles have but one";
  EXPECT_EQ(stages("pingpong96", -1), 8);
  EXPECT_EQ(stages("deep128", 128), 7);
  plan.quantizes = true;
  EXPECT_EQ(stages("quad8", 128), 5);
}

TEST(Sm90StagesAhead, WhereAnotherLaunchHasItsPartOfTheDevice) {
  Plan plan;
  plan.resident_blocks = 132;
  const auto stages = [&plan](std::string_view tile, int grid, int group_size, int64_t in_features = 4096,
                              bool constant_weights = true) {
    plan.tile = plan::sm90_tile_index(tile);
    plan.grid = grid;
    return plan::sm90_stages_ahead({16, 64 * grid, in_features, group_size, /*quantizes=*/false, constant_weights},
                                   plan);
  };
  EXPECT_EQ(stages("warp16", 98, 128), 4) << "two in registers, two in shared memory";
  EXPECT_EQ(stages("warp32", 98, 128, 3072), 3);
  EXPECT_EQ(stages("warp16", 98, 128, 4224), 2) << "the ring does not hold all of the inputs";
  EXPECT_EQ(stages("warp32", 98, 128), 2);
  EXPECT_EQ(stages("warp16", 98, 128, 4096, false), 0);
  EXPECT_EQ(stages("warp16", 99, 128), 0);
  EXPECT_EQ(stages("warp16", 98, -1), 2);
  EXPECT_EQ(stages("warp16", 99, -1), 0);
  EXPECT_EQ(stages("narrow64", 66, 128), 2);
  EXPECT_EQ(stages("narrow64", 67, 128), 0);
  EXPECT_EQ(stages("narrow64", 66, -1), 0);
  EXPECT_EQ(stages("narrow32", 66, 128), 0) << "for so few tokens warps are better";
  EXPECT_EQ(stages("narrow96", 66, 128), 0) << "no room for a quantisation beside it";
  EXPECT_EQ(stages("deep64", 64, 128), 0) << "another warp fills its ring";
}

TEST(Standalone, NothingIsDequantisedForALaunchThatIsNotThere) {
  const DeviceProperties device = plan::reference_device("sm_90");
  Problem problem = {16, 4096, 4096, 128, /*quantizes=*/false, /*constant_weights=*/true};
  const Plan overlapping = plan::make_plan(problem, device);
  EXPECT_GT(plan::sm90_stages_ahead(problem, overlapping), 0);
  problem.standalone = true;
  EXPECT_EQ(plan::sm90_stages_ahead(problem, overlapping), 0);
}

TEST(Standalone, ItsCandidatesAreRankedByAModelOfTheirOwn) {
  const DeviceProperties device = plan::reference_device("sm_90");
  for (const bool quantizes : {false, true}) {
    const Problem problem = {4, 2560, 4096, 128, quantizes, /*constant_weights=*/true, /*standalone=*/true};
    const std::vector<Plan> plans = plan::sm90_candidates(problem, device);
    ASSERT_FALSE(plans.empty());
    for (const Plan& plan : plans) {
      EXPECT_EQ(plan.estimated_us, plan::sm90_estimated_us(problem, device, plan, plan::kSm90StandaloneModel));
    }
  }
}

// Their model has seen no more than 512 tokens.
TEST(Standalone, LongProductsAreRankedAsInARow) {
  const DeviceProperties device = plan::reference_device("sm_90");
  for (const int64_t num_tokens : {513, 1024, 4096, 8192}) {
    for (const int64_t out_features : {1024, 4096, 28672}) {
      for (const int group_size : {-1, 128}) {
        const auto named = [&](bool standalone) {
          std::vector<std::string> names;
          for (const Plan& plan : plan::candidates(
                   {num_tokens, out_features, 4096, group_size, /*quantizes=*/true, true, standalone}, device)) {
            names.push_back(plan::to_string(plan));
          }
          return names;
        };
        EXPECT_EQ(named(true), named(false));
      }
    }
  }
}

// What overlaps with a launch is none of its business then: neither room for the next one nor the promise counts.
TEST(Standalone, WhatOverlapsDoesNotCount) {
  const DeviceProperties device = plan::reference_device("sm_90");
  plan::Sm90Model other = plan::kSm90StandaloneModel;
  other.neighbour_cycles = other.unfit_fraction = other.ahead_fraction = other.flow_hidden_fraction = 0;
  for (const int64_t num_tokens : {1, 16, 64, 500}) {
    for (const int64_t out_features : {1024, 4096, 28672}) {
      Problem problem = {num_tokens, out_features, 4096, -1, /*quantizes=*/false, /*constant_weights=*/true, true};
      for (const Plan& plan : plan::sm90_candidates(problem, device)) {
        EXPECT_EQ(plan.estimated_us, plan::sm90_estimated_us(problem, device, plan, other));
        Problem unpromised = problem;
        unpromised.constant_weights = false;
        EXPECT_EQ(plan.estimated_us, plan::sm90_estimated_us(unpromised, device, plan, plan::kSm90StandaloneModel));
      }
    }
  }
}

// Two blocks of four warps on a multiprocessor leave the next launch room; alone they do no more than one of eight.
TEST(Standalone, PairTilesThatShareMultiprocessorsAreNotChosen) {
  const DeviceProperties device = plan::reference_device("sm_90");
  for (const int64_t out_features : {4096, 5120, 8192, 14336}) {
    for (const int group_size : {-1, 128}) {
      const Problem problem = {8, out_features, 4096, group_size, false, /*constant_weights=*/true, true};
      const std::vector<Plan> plans = plan::sm90_candidates(problem, device);
      const auto least = [&plans](auto chosen) {
        double us = 1e30;
        for (const Plan& plan : plans) {
          if (chosen(plan)) us = std::min(us, plan.estimated_us);
        }
        return us;
      };
      const auto is_pair = [](const Plan& plan) { return plan.tile_name.starts_with("pair"); };
      const double sharing = least([&](const Plan& plan) { return is_pair(plan) && plan.grid > device.num_sms; });
      EXPECT_LT(sharing, 1e30) << out_features;  // else this shows nothing
      EXPECT_LT(least([&](const Plan& plan) { return !is_pair(plan); }), sharing) << out_features;
    }
  }
}

// What its quantisation adds to a launch, over a kernel of its own, is another number for every kind of tile.
TEST(Standalone, EveryKindOfTileHasItsOwnCostOfQuantising) {
  const DeviceProperties device = plan::reference_device("sm_90");
  const Problem problem = {4, 14336, 4096, 128, /*quantizes=*/true, /*constant_weights=*/true, /*standalone=*/true};
  std::set<long> nanoseconds;
  for (const std::string_view tile : {"warp8", "flow8", "quad8", "stream8"}) {
    std::set<long> of_tile;
    for (Plan plan : plan::sm90_candidates(problem, device)) {
      if (plan.tile_name != tile || !plan.quantizes) continue;
      const double inside = plan::sm90_estimated_us(problem, device, plan, plan::kSm90StandaloneModel);
      plan.quantizes = false;
      const double apart = plan::sm90_estimated_us(problem, device, plan, plan::kSm90StandaloneModel);
      of_tile.insert(std::lround(1e3 * (inside - apart)));
    }
    EXPECT_EQ(of_tile.size(), 1u) << tile;
    nanoseconds.merge(of_tile);
  }
  EXPECT_EQ(nanoseconds.size(), 4u);
}

TEST(Standalone, StagesOnTheirWayAreLimitedUpTo32TokensButOfFewWeightsWithoutGroups) {
  Plan plan;
  plan.resident_blocks = 132;
  plan.grid = 128;
  const auto stages = [&](std::string_view tile, int64_t out_features, int group_size, bool standalone = true) {
    plan.tile = plan::sm90_tile_index(tile);
    return plan::sm90_used_stages({16, out_features, 4096, group_size, false, /*constant_weights=*/true, standalone},
                                  plan);
  };
  EXPECT_EQ(stages("narrow16", 4096, 128, false), 8);
  EXPECT_EQ(stages("narrow16", 4096, 128), 5);
  EXPECT_EQ(stages("narrow16", 4096, -1), 8) << "8 MB per-channel";
  EXPECT_EQ(stages("narrow16", 8192, -1), 5) << "17 MB";
  EXPECT_EQ(stages("narrow48", 8192, 128), stages("narrow48", 8192, 128, false));
}

TEST(Sm90Tile, TheRowsThatAreLoadedHoldTheTokensAndStayInTheTile) {
  for (const plan::Sm90Tile& tile : plan::kSm90Tiles) {
    for (int multicast : {1, 2, 4}) {
      if (tile.tokens % (8 * multicast) != 0) continue;
      const int copies = tile.activation_copies(multicast);
      for (int64_t num_tokens = 1; num_tokens <= 2 * tile.tokens; ++num_tokens) {
        const int rows = tile.activation_rows(num_tokens, multicast);
        EXPECT_GE(rows * copies, std::min<int64_t>(num_tokens, tile.tokens)) << tile.name << ' ' << num_tokens;
        EXPECT_LE(rows * copies, tile.tokens) << tile.name << ' ' << num_tokens;
        EXPECT_LE(rows, plan::kLargestCopy) << tile.name << ' ' << num_tokens;
        if (copies > 1) {
          EXPECT_EQ(rows % 8, 0) << tile.name << ' ' << num_tokens;
        }
      }
      EXPECT_EQ(tile.activation_rows(1, multicast), copies == 1 ? 1 : 8);
      EXPECT_EQ(tile.activation_rows(1 << 20, multicast) * copies, tile.tokens);
    }
  }
}

TEST(Sm90Candidates, BlocksThatExchangeSumsHaveRoomAndBarriersForThem) {
  const DeviceProperties device = plan::reference_device("sm_90");
  int exchanges = 0;
  for (int64_t num_tokens : kTokens) {
    for (const Plan& candidate : plan::sm90_candidates({num_tokens, 1024, 8192, 128}, device)) {
      if (candidate.split == 1) continue;
      const plan::Sm90Tile& tile = plan::kSm90Tiles[candidate.tile];
      ++exchanges;
      // Received: from every other block, its sums of this block's share of the tokens, as int32.
      const int chunk = tile.depth_split() ? 1 : tile.store_tokens();
      const int chunks = (tile.tokens + chunk - 1) / chunk;
      const int block_chunks = (chunks + candidate.split - 1) / candidate.split;
      const int received = (candidate.split - 1) * block_chunks * chunk * tile.features() * 4;
      const int own = tile.depth_split() ? tile.partial_bytes() : 0;
      EXPECT_LE(own + received, tile.pipeline_bytes()) << candidate.tile_name << ' ' << candidate.split;
      if (!tile.depth_split()) {
        EXPECT_LE(block_chunks, tile.exchange_barriers()) << candidate.tile_name;
      }
      EXPECT_LE(candidate.split * candidate.multicast, plan::kLargestClusterSplit);
    }
  }
  EXPECT_GT(exchanges, 100);
}

TEST(Sm90Candidates, KernelsThatQuantiseHoldTheirRowsAndWarpsForEveryToken) {
  const DeviceProperties device = plan::reference_device("sm_90");
  int quantizing = 0;
  for (int64_t num_tokens = 1; num_tokens <= 17; ++num_tokens) {
    for (int64_t in_features : {128, 1024, 2048, 2176, 4096, 8192, 16384, 16512}) {
      const Problem problem{num_tokens, 1280, in_features, 128, /*quantizes=*/true};
      for (const Plan& candidate : plan::sm90_candidates(problem, device)) {
        if (!candidate.quantizes) continue;
        ++quantizing;
        expect_runnable(candidate, problem, device);
        const plan::Sm90Tile& tile = plan::kSm90Tiles[candidate.tile];
        const int warps = candidate.threads / 32;
        const int token_warps = tile.token_warps(num_tokens);
        EXPECT_GE(token_warps, 1);
        EXPECT_EQ(token_warps & (token_warps - 1), 0);
        EXPECT_LE(token_warps * num_tokens, warps);
        // A warp's threads keep its share of a token: quantized_vectors() times eight elements each.
        EXPECT_LE(in_features, token_warps * 32 * tile.quantized_vectors() * 8);
        const int64_t split = candidate.split * candidate.scratch_split;
        const int64_t stages = (in_features / 128 + split - 1) / split;
        const int64_t rows = num_tokens * 128 * stages, scales = 4 * tile.tokens, magnitudes = 4 * warps;
        EXPECT_GE(candidate.shared_memory_bytes - tile.shared_memory_bytes(), rows + scales + magnitudes);
        if (candidate.scratch_split > 1) {
          EXPECT_GE(candidate.scratch_bytes, 4 * num_tokens * (1280 * split + 1)) << "no room for the scales";
        }
      }
    }
  }
  EXPECT_GT(quantizing, 100);
}

TEST(Plan, OnlyProblemsThatQuantiseGetKernelsThatDo) {
  for (const char* architecture : kArchitectures) {
    const DeviceProperties device = plan::reference_device(architecture);
    for (int64_t num_tokens : kTokens) {
      const Problem problem{num_tokens, 4096, 4096, -1};
      Problem quantizing = problem;
      quantizing.quantizes = true;
      std::set<std::string> names;
      for (const Plan& candidate : plan::candidates(problem, device)) {
        EXPECT_FALSE(candidate.quantizes) << architecture;
        names.insert(plan::candidate_name(candidate));
      }
      size_t others = 0;
      for (const Plan& candidate : plan::candidates(quantizing, device)) {
        const std::string name = plan::candidate_name(candidate);
        EXPECT_EQ(candidate.quantizes, name.ends_with("/quantizing")) << name;
        EXPECT_EQ(names.contains(name), !candidate.quantizes) << name;
        others += !candidate.quantizes;
      }
      EXPECT_EQ(others, names.size()) << architecture;
    }
  }
}

}  // namespace
}  // namespace marlin_qqq
