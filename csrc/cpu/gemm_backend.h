// What an instruction set supplies to gemm.cpp. Everything works on blocks of 64 output features and slices of
// in_features that are multiples of 128, and adds into int32 sums that belong to one block: sums[token][64].
#pragma once

#include <cstdint>

#include "format/types.h"

namespace marlin_qqq::cpu {

inline constexpr int64_t kBlockColumns = 64;

// A slice of the packed weights of one block of columns.
struct WeightSlice {
  const int32_t* packed;        // first word of the block's first tile
  int64_t words_per_row;        // distance between tiles that follow each other in in_features
  const uint16_t* group_scale;  // the block's 64 stored scales of the first group; nullptr: per channel
  int64_t group_stride;         // distance between groups
  int64_t in_features;          // of the slice, % 128 == 0
};

// A slice of some tokens' activations.
struct ActivationSlice {
  const int8_t* data;
  int64_t stride;  // bytes between tokens
  int64_t num_tokens;
};

// Everything between a block's sums and its output.
struct BlockEpilogue {
  const int32_t* sums;         // [num_tokens][64], in the backend's own order of columns
  const float* token_scale;    // [num_tokens]
  const float* channel_scale;  // [64], natural order
  const float* bias;           // [64], natural order; nullptr: none
  uint16_t* output;            // first output of the block
  int64_t output_stride;       // elements between tokens
  int64_t num_tokens;
  format::OutputType output_type;
};

struct GemmBackend {
  // Bytes of scratch that a dequantised slice and prepared activations take: a weight, an activation.
  int64_t weight_bytes;
  int64_t activation_bytes;  // 0: multiply reads the activations themselves
  // Most tokens that `stream` takes; 0: there is no `stream`.
  int64_t most_streamed_tokens;

  // Value that every sum of this token starts from: backends whose multiplier wants unsigned weights use W8 + 128
  // and take 128 * sum(activations) back here. Arithmetic modulo 2^32, so no range is lost.
  int32_t (*initial_sum)(const int8_t* activations, int64_t in_features);
  // Rearranges a slice of activations for multiply (only if activation_bytes != 0): [num_tokens][in_features].
  void (*prepare_activations)(const ActivationSlice& activations, int64_t in_features, void* prepared);
  // Weights of one slice into scratch, as multiply wants them.
  void (*dequantize)(const WeightSlice& slice, void* weight);
  // sums += activations x weight. activations.data points into prepared activations if there are any.
  void (*multiply)(const ActivationSlice& activations, const void* weight, int64_t in_features, int32_t* sums);
  // dequantize and multiply in one pass, for so few tokens that every weight is used once or twice.
  void (*stream)(const ActivationSlice& activations, const WeightSlice& slice, int32_t* sums);
  void (*epilogue)(const BlockEpilogue& block);
};

const GemmBackend& generic_backend();
#if defined(__x86_64__)
const GemmBackend& avx2_backend();
const GemmBackend& avx_vnni_backend();
const GemmBackend& avx512_vnni_backend();
#elif defined(__aarch64__)
const GemmBackend& neon_dotprod_backend();
#endif

#define MARLIN_QQQ_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define MARLIN_QQQ_UNROLL MARLIN_QQQ_PRAGMA(unroll)
#else
#define MARLIN_QQQ_UNROLL MARLIN_QQQ_PRAGMA(GCC unroll 16)
#endif

}  // namespace marlin_qqq::cpu
