// Adds the partial sums that clusters have left in scratch, and finishes the output. A kernel of its own in place of a
// counter a tile: scratch needs no zeros, no block waits for another, and nothing is left behind by an aborted launch.
// Dependent launch hides its start, and the kernel after it fetches weights meanwhile.
#pragma once

#include "cuda/common/dependent_launch.cuh"
#include "cuda/common/output.cuh"

namespace marlin_qqq::cuda::sm90 {

inline constexpr int kReductionThreads = 256;

struct Reduction {
  const int32_t* sums;  // [split][num_tokens][out_features]
  const float* token_scale;
  const float* channel_scale;
  const void* bias;
  void* output;
  bool output_is_bfloat16;
  int split;
  int num_tokens;
  int out_features;
};

inline __global__ void __launch_bounds__(kReductionThreads) reduce_kernel(const Reduction r) {
  allow_next_kernel();
  const int64_t slot = static_cast<int64_t>(r.num_tokens) * r.out_features / 4;  // vectors of four features
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kReductionThreads + threadIdx.x;
  const int row = static_cast<int>(4 * index / r.out_features);
  const int column = static_cast<int>(4 * index - static_cast<int64_t>(row) * r.out_features);
  wait_for_previous_kernel();
  if (index >= slot) return;
  const ColumnFactors factors(r.channel_scale, r.bias, column, r.output_is_bfloat16);
  const float token_scale = __ldcg(r.token_scale + row);
  const int4* sums = reinterpret_cast<const int4*>(r.sums) + index;
  int4 total = __ldcg(sums);
#pragma unroll 4
  for (int s = 1; s < r.split; ++s) {
    const int4 part = __ldcg(sums + s * slot);
    add_sums(total, part);
  }
  factors.store(total, token_scale, r.output, row, column, r.out_features);
}

}  // namespace marlin_qqq::cuda::sm90
