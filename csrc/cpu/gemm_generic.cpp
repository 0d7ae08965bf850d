// Portable backend: the reference for the others, and the one for processors without a vector backend. Plain loops over
// contiguous bytes, which compilers vectorise for the build's baseline.
#include "cpu/gemm_backend.h"
#include "format/epilogue.h"
#include "format/float16.h"
#include "format/limits.h"
#include "format/packed_weight.h"
#include "format/rounding.h"
#include "format/scale_permutation.h"

namespace marlin_qqq::cpu {
namespace {

int32_t initial_sum(const int8_t*, int64_t) { return 0; }

// weight: int8 [64][in_features]
void dequantize(const WeightSlice& slice, void* weight) {
  const bool grouped = slice.group_scale != nullptr;
  for (int64_t j = 0; j < kBlockColumns; ++j) {
    int8_t* column = static_cast<int8_t*>(weight) + j * slice.in_features;
    for (int64_t first = 0; first < slice.in_features; first += format::kGroupSize) {
      // All sixteen weights that this group of this column can hold
      int8_t table[16];
      const float scale =
          grouped ? format::float16_to_float(slice.group_scale[first / format::kGroupSize * slice.group_stride +
                                                               format::stored_group_scale_column(j)])
                  : 0.0F;
      for (uint32_t nibble = 0; nibble < 16; ++nibble) {
        const int code = format::decode_nibble(nibble, grouped);
        table[nibble] = grouped ? format::group_weight(code, scale) : format::channel_weight(code);
      }
      for (int64_t k = first; k < first + format::kGroupSize; ++k) {
        const format::PackedPosition position = format::packed_position(k, j, grouped);
        const auto word = static_cast<uint32_t>(slice.packed[position.row * slice.words_per_row + position.word]);
        column[k] = table[(word >> (4 * position.nibble)) & 0xFu];
      }
    }
  }
}

void multiply(const ActivationSlice& activations, const void* weight, int64_t in_features, int32_t* sums) {
  for (int64_t token = 0; token < activations.num_tokens; ++token) {
    const int8_t* row = activations.data + token * activations.stride;
    for (int64_t j = 0; j < kBlockColumns; ++j) {
      const int8_t* column = static_cast<const int8_t*>(weight) + j * in_features;
      int32_t sum = 0;  // a slice cannot overflow; the total wraps like the vector backends'
      for (int64_t k = 0; k < in_features; ++k) {
        sum += static_cast<int16_t>(row[k]) * static_cast<int16_t>(column[k]);
      }
      int32_t& total = sums[token * kBlockColumns + j];
      total = static_cast<int32_t>(static_cast<uint32_t>(total) + static_cast<uint32_t>(sum));
    }
  }
}

void epilogue(const BlockEpilogue& block) {
  for (int64_t token = 0; token < block.num_tokens; ++token) {
    for (int64_t j = 0; j < kBlockColumns; ++j) {
      float value =
          format::scaled_sum(block.sums[token * kBlockColumns + j], block.channel_scale[j], block.token_scale[token]);
      if (block.bias != nullptr) {
        value = format::biased(value, block.bias[j]);
      }
      block.output[token * block.output_stride + j] = format::float_to_output(value, block.output_type);
    }
  }
}

}  // namespace

const GemmBackend& generic_backend() {
  static constexpr GemmBackend kBackend{/*weight_bytes=*/1,
                                        /*activation_bytes=*/0,
                                        /*most_streamed_tokens=*/0,
                                        initial_sum,
                                        /*prepare_activations=*/nullptr,
                                        dequantize,
                                        multiply,
                                        /*stream=*/nullptr,
                                        epilogue};
  return kBackend;
}

}  // namespace marlin_qqq::cpu
