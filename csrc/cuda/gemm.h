// The CUDA product behind marlin_qqq_gemm, free of torch: plain pointers in, a cudaError_t out.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "plan/plan.h"

namespace marlin_qqq::cuda {

enum class OutputType { kFloat16, kBFloat16 };

// Activations before their quantisation: [num_tokens, in_features] fp16 or bf16, contiguous rows `stride` elements
// apart, 16-byte aligned.
struct Rows {
  const void* x;
  int64_t stride;
  bool bfloat16;
};

// Device pointers of one product, 16-byte aligned, contiguous. Layouts: docs/format.md.
struct GemmArguments {
  const int8_t* activations;     // [num_tokens, in_features]; nullptr: the kernel quantises `rows` (plan.quantizes)
  const int32_t* packed_weight;  // [in_features / 16, 2 * out_features]
  const float* token_scale;      // [num_tokens], 4-byte aligned; nullptr with `rows`
  const float* channel_scale;    // [out_features], permuted
  const void* group_scale;       // fp16 [in_features / 128, out_features], permuted; nullptr: per-channel
  const void* bias;              // OutputType [out_features], natural order; nullptr: none
  void* output;                  // OutputType [num_tokens, out_features]
  OutputType output_type;
  Rows rows = {};
};

// Properties of the current device as the planner wants them; cached a device.
cudaError_t current_device_properties(plan::DeviceProperties* properties);

// Enqueues the product on `stream` of the current device. `scratch`: plan.scratch_bytes of device memory that stays
// allocated until the stream has passed the launch; its content does not matter before and after.
cudaError_t launch_gemm(const plan::Plan& plan, const plan::Problem& problem, const GemmArguments& arguments,
                        void* scratch, cudaStream_t stream);

}  // namespace marlin_qqq::cuda
