// Outputs from sums by the contract's arithmetic (format/epilogue.h), then one rounding to the output type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/common/shared_memory.cuh"
#include "format/epilogue.h"
#include "format/scale_permutation.h"

namespace marlin_qqq::cuda {

// Partial sums of four features: exact in any order.
__device__ __forceinline__ void add_sums(int4& sum, const int4& part) {
  sum.x += part.x;
  sum.y += part.y;
  sum.z += part.z;
  sum.w += part.w;
}

// Two values, rounded to the output type; `low` in the lower half.
__device__ __forceinline__ uint32_t pack_outputs(float low, float high, bool bfloat16) {
  if (bfloat16) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// A bias, stored in the output type. Kernels load its bits early and convert them late: the load then hides behind the
// products.
__device__ __forceinline__ float bias_value(uint32_t bits, bool bfloat16) {
  if (bfloat16) return __uint_as_float(bits << 16);
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

// Channel scales and biases of four neighbouring features, and what they make of sums. A kernel fetches them before its
// sums are there, from L2: L1 may hold what they were before the kernel ahead, which ran meanwhile, wrote them.
// `column` is a multiple of four; `bias` may be null.
struct ColumnFactors {
  float4 channel_scale;
  uint2 bias;  // four of 16 bits
  bool has_bias;
  bool bfloat16;

  ColumnFactors() = default;
  __device__ __forceinline__ ColumnFactors(const float* channel_scales, const void* biases, int column, bool bfloat16)
      : bias{0, 0}, has_bias(biases != nullptr), bfloat16(bfloat16) {
    load_channel_scales(
        column, [&](uint32_t stored) { return __ldcg(reinterpret_cast<const float2*>(channel_scales + stored)); });
    if (has_bias) bias = __ldcg(reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(biases) + column));
  }

  // From copies of the same layout in shared memory, whose first column is the first one there; no `biases` without
  // `has_bias`.
  __device__ __forceinline__ ColumnFactors(uint32_t channel_scales, uint32_t biases, int column, bool has_bias,
                                           bool bfloat16)
      : bias{0, 0}, has_bias(has_bias), bfloat16(bfloat16) {
    load_channel_scales(column, [&](uint32_t stored) { return shared_load_float2(channel_scales + 4 * stored); });
    if (has_bias) {
      const float2 bits = shared_load_float2(biases + 2 * column);
      bias = {__float_as_uint(bits.x), __float_as_uint(bits.y)};
    }
  }

  // The outputs of one token.
  __device__ __forceinline__ void store(int4 sum, float token_scale, void* output, int64_t row, int column,
                                        int64_t out_features) const {
    float4 value = {format::scaled_sum(sum.x, channel_scale.x, token_scale),
                    format::scaled_sum(sum.y, channel_scale.y, token_scale),
                    format::scaled_sum(sum.z, channel_scale.z, token_scale),
                    format::scaled_sum(sum.w, channel_scale.w, token_scale)};
    if (has_bias) {
      value.x = format::biased(value.x, bias_value(bias.x & 0xffffu, bfloat16));
      value.y = format::biased(value.y, bias_value(bias.x >> 16, bfloat16));
      value.z = format::biased(value.z, bias_value(bias.y & 0xffffu, bfloat16));
      value.w = format::biased(value.w, bias_value(bias.y >> 16, bfloat16));
    }
    const uint2 packed = {pack_outputs(value.x, value.y, bfloat16), pack_outputs(value.z, value.w, bfloat16)};
    *reinterpret_cast<uint2*>(static_cast<uint16_t*>(output) + row * out_features + column) = packed;
  }

 private:
  // Two pairs of neighbours in the stored order (see format::stored_channel_scale_column), each from `pair`.
  template <class Pair>
  __device__ __forceinline__ void load_channel_scales(int column, const Pair& pair) {
    const auto first = static_cast<uint32_t>(column);
    const float2 scale01 = pair(format::stored_channel_scale_column(first));
    const float2 scale23 = pair(format::stored_channel_scale_column(first + 2));
    channel_scale = {scale01.x, scale01.y, scale23.x, scale23.y};
  }
};

}  // namespace marlin_qqq::cuda
