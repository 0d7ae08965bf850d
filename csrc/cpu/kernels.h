// The ops on the CPU, free of torch. Exact: the same bits for every instruction set, thread count and batch.
// Callers have checked the arguments (csrc/torch); pointers need the alignment of their element type only.
#pragma once

#include <cstdint>

#include "format/types.h"

namespace marlin_qqq::cpu {

using format::InputType;
using format::OutputType;

// output[m, n] = round(fp32(fp32(fp32(sum_k activations[m, k] * W8[k, n]) * channel_scale[n]) * token_scale[m]) +
// bias[n])
//   activations    int8 [num_tokens, in_features]
//   packed_weight  int32 [in_features / 16, 2 * out_features]
//   token_scale    fp32 [num_tokens]
//   channel_scale  fp32 [out_features], stored order
//   group_scale    fp16 bits [in_features / 128, out_features], stored order; nullptr: per channel
//   bias           output_type [out_features], natural order; nullptr: none
//   output         output_type [num_tokens, out_features]
// out_features % 64 == 0, in_features % 128 == 0, in_features < format::kInFeaturesLimit; any size may be 0.
void gemm(const int8_t* activations, const int32_t* packed_weight, const float* token_scale, const float* channel_scale,
          const uint16_t* group_scale, const void* bias, void* output, OutputType output_type, int64_t num_tokens,
          int64_t out_features, int64_t in_features, int num_threads);

// x [num_tokens, in_features], rows row_stride elements apart -> quantized [num_tokens, in_features] contiguous,
// token_scale fp32 [num_tokens].
void quantize_per_token(const void* x, InputType input_type, int64_t num_tokens, int64_t in_features,
                        int64_t row_stride, int8_t* quantized, float* token_scale, int num_threads);

// codes int8 [in_features, out_features] in [-8, 7] (only the low four bits are looked at) <-> packed
// int32 [in_features / 16, 2 * out_features]. in_features % 16 == 0, out_features % 64 == 0.
void pack_weight(const int8_t* codes, int64_t in_features, int64_t out_features, bool grouped, int32_t* packed,
                 int num_threads);
void unpack_weight(const int32_t* packed, int64_t in_features, int64_t out_features, bool grouped, int8_t* codes,
                   int num_threads);

// The smallest and the largest code, for the caller's range check. {0, 0} for no codes.
struct CodeRange {
  int minimum;
  int maximum;
};
CodeRange code_range(const int8_t* codes, int64_t count, int num_threads);

// Reorders the last dimension of rows of 2-byte or 4-byte elements between natural and stored order.
// out_features % 64 == 0 (channel scales: % 32). source and destination must not overlap.
enum class ScaleKind { kGroup, kChannel };
void permute_scale(const void* natural, ScaleKind kind, int64_t rows, int64_t out_features, int element_bytes,
                   void* stored);
void unpermute_scale(const void* stored, ScaleKind kind, int64_t rows, int64_t out_features, int element_bytes,
                     void* natural);

// Instruction sets that gemm can use, best last. The best one that the machine has is taken, unless the environment
// variable MARLIN_QQQ_CPU_LEVEL or set_instruction_set names a lesser one.
enum class InstructionSet { kGeneric, kAvx2, kAvxVnni, kAvx512Vnni, kNeonDotprod };
const char* instruction_set_name(InstructionSet set);  // "generic", "avx2", "avx_vnni", "avx512_vnni", "neon_dotprod"
bool is_supported(InstructionSet set);
InstructionSet instruction_set();
// For tests. Returns false, and changes nothing, if the machine lacks it. Not to be called while a kernel runs.
bool set_instruction_set(InstructionSet set);

}  // namespace marlin_qqq::cpu
