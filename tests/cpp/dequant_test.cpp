// The bit tricks of the CUDA kernels, run on the host over every code in every nibble and every fp16 scale, against the
// rounding rule and the index maps of csrc/format.
#include "cuda/dequant/dequant.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>

#include "format/float16.h"
#include "format/packed_weight.h"
#include "format/rounding.h"

namespace marlin_qqq {
namespace {

// The trick promises the rounded product modulo 256 up to here.
constexpr float kLargestProduct = 512.0F;

int byte_of(uint32_t word, int64_t i) { return static_cast<int8_t>(word >> (8 * i)); }

// Nibble p of word v is p * 5 + v modulo 16: sixteen words put every code into every nibble.
uint32_t test_word(int v) {
  uint32_t word = 0;
  for (uint32_t p = 0; p < 8; ++p) {
    word |= ((p * 5 + static_cast<uint32_t>(v)) & 15u) << (4 * p);
  }
  return word;
}

// The code of input k = r of column 8 * b in a word.
int code_of(uint32_t word, int64_t r, int64_t b, bool grouped) {
  return format::decode_nibble(word >> (4 * format::packed_nibble(r, 8 * b, grouped)), grouped);
}

TEST(Dequantize, PerChannelEveryCodeInEveryNibble) {
  for (int v = 0; v < 16; ++v) {
    const uint32_t word = test_word(v);
    const dequant::Columns columns = dequant::dequantize_per_channel(word);
    for (int64_t r = 0; r < 4; ++r) {
      EXPECT_EQ(byte_of(columns.column0, r), format::channel_weight(code_of(word, r, 0, false)));
      EXPECT_EQ(byte_of(columns.column8, r), format::channel_weight(code_of(word, r, 1, false)));
    }
  }
}

// The two columns of a word have neighbouring stored scales: the two halves of one 32-bit load.
TEST(Dequantize, PerGroupEveryCodeInEveryNibbleAndEveryScale) {
  for (uint32_t low = 0; low < 65536; ++low) {
    const uint32_t high = low ^ 0x8000u;  // every scale meets both columns
    const float scale[2] = {format::float16_to_float(static_cast<uint16_t>(low)),
                            format::float16_to_float(static_cast<uint16_t>(high))};
    if (!(std::fabs(scale[0]) <= kLargestProduct)) {
      continue;
    }
    const dequant::GroupScales scales = dequant::group_scales(high << 16 | low);
    for (int v = 0; v < 16; ++v) {
      const uint32_t word = test_word(v);
      const dequant::Columns columns = dequant::dequantize_per_group(word, scales);
      for (int64_t b = 0; b < 2; ++b) {
        for (int64_t r = 0; r < 4; ++r) {
          const int code = code_of(word, r, b, true);
          if (std::fabs(static_cast<float>(code) * scale[b]) > kLargestProduct) {
            continue;
          }
          ASSERT_EQ(byte_of(b == 0 ? columns.column0 : columns.column8, r), format::group_weight(code, scale[b]))
              << "scale " << scale[b] << ", word " << word << ", column " << b << ", r " << r;
        }
      }
    }
  }
}

}  // namespace
}  // namespace marlin_qqq
