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

// Stages of the longest ring of a launch of tiles whose rings share the inputs.
int64_t sm90_ring_stages(const Problem& problem, const Plan& plan);

// Stages of every ring that a launch dequantises while the launch before it ends, if the weights are constant, and only
// where there is time for it: warps need a quarter of the device beside them, warpgroups, which wait for more
// activations and do it with group scales only, a half.
int sm90_stages_ahead(const Problem& problem, const Plan& plan);

// The largest problem the kernels' 32-bit coordinates take.
inline constexpr int64_t kLargestExtent = int64_t{1} << 30;

}  // namespace marlin_qqq::plan
