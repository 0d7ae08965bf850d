// marlin_qqq_gemm on the CPU.
#include <algorithm>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/thread_pool.h"
#include "format/epilogue.h"
#include "format/float16.h"
#include "format/limits.h"
#include "format/packed_weight.h"
#include "format/rounding.h"
#include "format/scale_permutation.h"

namespace marlin_qqq::cpu {

const char* instruction_set_name(InstructionSet) { return "generic"; }
bool is_supported(InstructionSet set) { return set == InstructionSet::kGeneric; }
InstructionSet instruction_set() { return InstructionSet::kGeneric; }
bool set_instruction_set(InstructionSet set) { return is_supported(set); }

void gemm(const int8_t* activations, const int32_t* packed_weight, const float* token_scale, const float* channel_scale,
          const uint16_t* group_scale, const void* bias, void* output, OutputType output_type, int64_t num_tokens,
          int64_t out_features, int64_t in_features, int num_threads) {
  const bool grouped = group_scale != nullptr;
  constexpr int64_t kColumns = 8;
  auto columns_block = [&](int64_t block) {
    std::vector<int8_t> weight(static_cast<size_t>(kColumns * in_features));
    for (int64_t j = 0; j < kColumns; ++j) {
      const int64_t n = block * kColumns + j;
      for (int64_t k = 0; k < in_features; ++k) {
        const auto position = format::packed_position(k, n, grouped);
        const auto word = static_cast<uint32_t>(packed_weight[position.row * 2 * out_features + position.word]);
        const int code = format::decode_nibble(word >> (4 * position.nibble), grouped);
        weight[static_cast<size_t>(j * in_features + k)] =
            grouped ? format::group_weight(
                          code, format::float16_to_float(group_scale[k / format::kGroupSize * out_features +
                                                                     format::stored_group_scale_column(n)]))
                    : format::channel_weight(code);
      }
    }
    for (int64_t m = 0; m < num_tokens; ++m) {
      for (int64_t j = 0; j < kColumns; ++j) {
        const int64_t n = block * kColumns + j;
        const int8_t* row = activations + m * in_features;
        const int8_t* column = weight.data() + j * in_features;
        int32_t sum = 0;
        for (int64_t k = 0; k < in_features; ++k) {
          sum += row[k] * column[k];
        }
        float value =
            format::scaled_sum(sum, channel_scale[format::stored_channel_scale_column(n)], token_scale[m]);
        if (bias != nullptr) {
          value = format::biased(value, format::output_to_float(static_cast<const uint16_t*>(bias)[n], output_type));
        }
        static_cast<uint16_t*>(output)[m * out_features + n] = format::float_to_output(value, output_type);
      }
    }
  };
  parallel_for(out_features / kColumns, num_threads, columns_block);
}

}  // namespace marlin_qqq::cpu
