// One function an architecture: its candidates for a problem, with estimated times, unsorted.
#pragma once

#include <vector>

#include "plan/plan.h"
#include "plan/sm90_model.h"

namespace marlin_qqq::plan {

std::vector<Plan> sm80_candidates(const Problem& problem, const DeviceProperties& device);
std::vector<Plan> sm90_candidates(const Problem& problem, const DeviceProperties& device);

// What a fit of the model needs: candidates ranked by other constants, and one candidate's time by them.
std::vector<Plan> sm90_candidates(const Problem& problem, const DeviceProperties& device, const Sm90Model& model);
double sm90_estimated_us(const Problem& problem, const DeviceProperties& device, const Plan& plan,
                         const Sm90Model& model);

// Whether a launch runs at the power limit: from a twentieth of a millisecond and many tokens on, the clock is what
// that leaves, and lower in a row of such launches than in a burst after a rest.
bool sm90_is_power_limited(const Problem& problem);

inline int64_t packed_weight_bytes(const Problem& problem) { return problem.out_features * problem.in_features / 2; }

// A launch that stands alone then waits for its activations rather than for its weights.
inline bool has_few_weights(const Problem& problem) {
  constexpr int64_t kSmallBytes = 16'000'000;
  return packed_weight_bytes(problem) <= kSmallBytes;
}

// Stages of the longest ring of a launch of tiles whose rings share the inputs.
int64_t sm90_ring_stages(const Problem& problem, const Plan& plan);

// Stages of every ring that a launch uses: what a ring has on its way at a time. More than keep the memory bus busy
// only make the activations wait: with 115 KB a multiprocessor (130 KB from 33 tokens on) in place of 200, launches
// without constant weights took 1 to 5 % less time on an H100, and those with them that go round their rings often 1
// to 3 %. Others with them want all stages, for what arrives before the launch before has ended counts for more, and
// so do blocks of a second round, which start with empty rings beside others in full flow. Launches that stand alone
// want fewer up to 32 tokens, 2 to 5 % less time, but for small ones per-channel. Beyond 112 tokens other things count.
int sm90_used_stages(const Problem& problem, const Plan& plan);

// Stages of every ring that a launch dequantises while the launch before it ends, if the weights are constant, and only
// where there is time for it: not in a launch that stands alone; warps need a quarter of the device beside them,
// warpgroups, which wait for more activations and do it with group scales only, a half.
int sm90_stages_ahead(const Problem& problem, const Plan& plan);

// The largest problem the kernels' 32-bit coordinates take.
inline constexpr int64_t kLargestExtent = int64_t{1} << 30;

}  // namespace marlin_qqq::plan
