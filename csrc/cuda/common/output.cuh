// The epilogue's arithmetic, in the contract's order: sum x channel scale x token scale (+ bias), each step rounded to
// fp32, then one rounding to the output type. No fused multiply-add.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "format/scale_permutation.h"

namespace marlin_qqq::cuda {

__device__ __forceinline__ float scaled(int32_t sum, float channel_scale, float token_scale) {
  return __fmul_rn(__fmul_rn(__int2float_rn(sum), channel_scale), token_scale);
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

__device__ __forceinline__ float load_bias(const void* bias, int column, bool bfloat16) {
  if (bfloat16) return __bfloat162float(static_cast<const __nv_bfloat16*>(bias)[column]);
  return __half2float(static_cast<const __half*>(bias)[column]);
}

// Four neighbouring features of one token; column is a multiple of four.
__device__ __forceinline__ void store_outputs(int4 sum, float token_scale, const float* channel_scales,
                                              const void* bias, void* output, int64_t row, int column,
                                              int64_t out_features, bool bfloat16) {
  // Two pairs of neighbours in the stored order: see format::stored_channel_scale_column.
  const float2 scale01 = *reinterpret_cast<const float2*>(channel_scales + format::stored_channel_scale_column(column));
  const float2 scale23 =
      *reinterpret_cast<const float2*>(channel_scales + format::stored_channel_scale_column(column + 2));
  float4 value = {scaled(sum.x, scale01.x, token_scale), scaled(sum.y, scale01.y, token_scale),
                  scaled(sum.z, scale23.x, token_scale), scaled(sum.w, scale23.y, token_scale)};
  if (bias != nullptr) {
    value.x = __fadd_rn(value.x, load_bias(bias, column, bfloat16));
    value.y = __fadd_rn(value.y, load_bias(bias, column + 1, bfloat16));
    value.z = __fadd_rn(value.z, load_bias(bias, column + 2, bfloat16));
    value.w = __fadd_rn(value.w, load_bias(bias, column + 3, bfloat16));
  }
  const uint2 packed = {pack_outputs(value.x, value.y, bfloat16), pack_outputs(value.z, value.w, bfloat16)};
  *reinterpret_cast<uint2*>(static_cast<uint16_t*>(output) + row * out_features + column) = packed;
}

}  // namespace marlin_qqq::cuda
