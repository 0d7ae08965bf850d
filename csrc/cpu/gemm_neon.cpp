// NEON backend for arm64 with the dot-product instructions (Armv8.2 and later: Graviton 2, Ampere Altra, Apple
// silicon).
//
// sdot multiplies four signed bytes by four signed bytes into each int32, exactly. A vector holds four successive k of
// four columns: that is how words lie in a packed tile, so nothing has to be transposed on the way in.
//
// Order of a block's sums: bundle 2 * b + h, vector i, element j: column 16 * j + 8 * b + 4 * h + i.
#include "cpu/gemm_backend.h"
#include "cpu/instruction_set.h"

#if defined(MARLIN_QQQ_HAVE_NEON_DOTPROD)

#include <arm_neon.h>

#include <cmath>

#include "format/limits.h"

#define TARGET MARLIN_QQQ_TARGET_NEON_DOTPROD

namespace marlin_qqq::cpu {
namespace {

constexpr int64_t kRowsPerGroup = format::kGroupSize / format::kTileInFeatures;
constexpr int kBundles = 4;
constexpr int64_t kBundleRowBytes = 4 * 4 * 16;  // of 16 k: [quad of k][vector i][16 bytes]

int32_t no_initial_sum(const int8_t*, int64_t) { return 0; }

// The two columns' weights in four words of column c: 16 * j + 8 * b + c in element j, four successive k each.
struct ColumnPair {
  int8x16_t b[2];
};

TARGET inline ColumnPair channel_weights(uint32x4_t words) {
  const uint32x4_t mask = vdupq_n_u32(0xF0F0F0F0u);
  return {{vreinterpretq_s8_u32(vandq_u32(words, mask)), vreinterpretq_s8_u32(vandq_u32(vshlq_n_u32(words, 4), mask))}};
}

// The sixteen weights that each code can mean in each of four columns 16 * j. `scale`: of column j = 0; the others
// follow two apart.
TARGET inline uint8x16x4_t group_table(const float* scale) {
  static const float kCodes[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
  uint8x16x4_t table;
  for (int j = 0; j < 4; ++j) {
    int16x4_t narrow[4];
    for (int part = 0; part < 4; ++part) {
      const float32x4_t product = vmulq_n_f32(vld1q_f32(kCodes + 4 * part), scale[2 * j]);
      narrow[part] = vmovn_s32(vcvtnq_s32_f32(product));  // rounds half to even; narrowing keeps the low half
    }
    const int8x8_t low = vmovn_s16(vcombine_s16(narrow[0], narrow[1]));
    const int8x8_t high = vmovn_s16(vcombine_s16(narrow[2], narrow[3]));
    table.val[j] = vreinterpretq_u8_s8(vcombine_s8(low, high));
  }
  return table;
}

TARGET inline ColumnPair group_weights(uint32x4_t words, const uint8x16x4_t& table0, const uint8x16x4_t& table1) {
  // Nibbles in order of k: 0, 4, 1, 5 (b = 0) and 2, 6, 3, 7 (b = 1). With bytes 1 and 2 of a word swapped each half
  // word has the first two nibbles of both columns as low nibbles and the last two as high nibbles.
  static const uint8_t kSwap[16] = {0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15};
  static const uint32_t kColumn[4] = {0x00000000u, 0x10101010u, 0x20202020u,
                                      0x30303030u};  // 16 * j: its part of a table
  const uint32x4_t swapped = vreinterpretq_u32_u8(vqtbl1q_u8(vreinterpretq_u8_u32(words), vld1q_u8(kSwap)));
  const uint32x4_t low = vdupq_n_u32(0x00000F0Fu);
  const uint32x4_t high = vdupq_n_u32(0x0F0F0000u);
  const uint32x4_t column = vld1q_u32(kColumn);
  const uint32x4_t codes0 = vorrq_u32(vandq_u32(swapped, low), vandq_u32(vshlq_n_u32(swapped, 12), high));
  const uint32x4_t codes1 =
      vorrq_u32(vandq_u32(vshrq_n_u32(swapped, 4), high), vandq_u32(vshrq_n_u32(swapped, 16), low));
  return {{vreinterpretq_s8_u8(vqtbl4q_u8(table0, vreinterpretq_u8_u32(vorrq_u32(codes0, column)))),
           vreinterpretq_s8_u8(vqtbl4q_u8(table1, vreinterpretq_u8_u32(vorrq_u32(codes1, column))))}};
}

// A block's 64 scales of one group as fp32, stored order: 8 * c + 2 * j + b. Not finite -> 0, so that every weight is
// 0.
TARGET inline void load_scales(const uint16_t* stored, float* scales) {
  for (int n = 0; n < kBlockColumns; n += 4) {
    vst1q_f32(scales + n, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(stored + n))));
  }
  for (int n = 0; n < kBlockColumns; ++n) {
    scales[n] = std::fabs(scales[n]) <= 65504.0F ? scales[n] : 0.0F;
  }
}

// weight: [bundle][row of 16 k][quad of k][vector i][4 columns x 4 k]
template <bool kGrouped>
TARGET void dequantize_slice(const WeightSlice& slice, int8_t* weight) {
  const int64_t num_rows = slice.in_features / format::kTileInFeatures;
  float scales[kBlockColumns] = {};
  for (int64_t first = 0; first < num_rows; first += kRowsPerGroup) {
    if (kGrouped) {
      load_scales(slice.group_scale + first / kRowsPerGroup * slice.group_stride, scales);
    }
    for (int c = 0; c < 8; ++c) {
      uint8x16x4_t table[2] = {};
      if (kGrouped) {
        table[0] = group_table(scales + 8 * c);
        table[1] = group_table(scales + 8 * c + 1);
      }
      for (int64_t row = first; row < first + kRowsPerGroup; ++row) {
        for (int quad = 0; quad < 4; ++quad) {
          const int32_t* source = slice.packed + row * slice.words_per_row + 16 * c + 4 * quad;
          const uint32x4_t words = vreinterpretq_u32_s32(vld1q_s32(source));
          const ColumnPair pair = kGrouped ? group_weights(words, table[0], table[1]) : channel_weights(words);
          for (int b = 0; b < 2; ++b) {
            const int bundle = 2 * b + c / 4;
            vst1q_s8(weight + (bundle * num_rows + row) * kBundleRowBytes + (4 * quad + c % 4) * 16, pair.b[b]);
          }
        }
      }
    }
  }
}

TARGET void dequantize(const WeightSlice& slice, void* weight) {
  if (slice.group_scale != nullptr) {
    dequantize_slice<true>(slice, static_cast<int8_t*>(weight));
  } else {
    dequantize_slice<false>(slice, static_cast<int8_t*>(weight));
  }
}

constexpr int kTokensPerTile = 4;  // 16 accumulators, 4 activations, 4 weights

// Sums of one token and one bundle: columns of vector i.
struct BundleSums {
  int32x4_t v0, v1, v2, v3;
};

TARGET inline BundleSums load_sums(const int32_t* sums) {
  return {vld1q_s32(sums), vld1q_s32(sums + 4), vld1q_s32(sums + 8), vld1q_s32(sums + 12)};
}

TARGET inline void store_sums(const BundleSums& sum, int32_t* sums) {
  vst1q_s32(sums, sum.v0);
  vst1q_s32(sums + 4, sum.v1);
  vst1q_s32(sums + 8, sum.v2);
  vst1q_s32(sums + 12, sum.v3);
}

// Four vectors of weights at four k x the activations of those k.
template <int kQuad>
TARGET inline void multiply_add(BundleSums& sum, const int8x16_t (&w)[4], int8x16_t a) {
  sum.v0 = vdotq_laneq_s32(sum.v0, w[0], a, kQuad);
  sum.v1 = vdotq_laneq_s32(sum.v1, w[1], a, kQuad);
  sum.v2 = vdotq_laneq_s32(sum.v2, w[2], a, kQuad);
  sum.v3 = vdotq_laneq_s32(sum.v3, w[3], a, kQuad);
}

template <int kTokens, int kQuad>
TARGET inline void multiply_quad(BundleSums (&sum)[kTokensPerTile], const int8_t* weight,
                                 const int8x16_t (&a)[kTokensPerTile]) {
  const int8_t* quad = weight + 64 * kQuad;
  const int8x16_t w[4] = {vld1q_s8(quad), vld1q_s8(quad + 16), vld1q_s8(quad + 32), vld1q_s8(quad + 48)};
  multiply_add<kQuad>(sum[0], w, a[0]);
  if (kTokens > 1) multiply_add<kQuad>(sum[1], w, a[1]);
  if (kTokens > 2) multiply_add<kQuad>(sum[2], w, a[2]);
  if (kTokens > 3) multiply_add<kQuad>(sum[3], w, a[3]);
}

template <int kTokens>
TARGET void multiply_tile(const int8_t* activations, int64_t stride, const int8_t* weight, int64_t in_features,
                          int32_t* sums) {
  BundleSums sum[kTokensPerTile] = {};
  MARLIN_QQQ_UNROLL
  for (int t = 0; t < kTokens; ++t) {
    sum[t] = load_sums(sums + t * kBlockColumns);
  }
  for (int64_t k = 0; k < in_features; k += 16) {
    int8x16_t a[kTokensPerTile] = {};
    MARLIN_QQQ_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      a[t] = vld1q_s8(activations + t * stride + k);
    }
    const int8_t* row = weight + k / 16 * kBundleRowBytes;
    multiply_quad<kTokens, 0>(sum, row, a);
    multiply_quad<kTokens, 1>(sum, row, a);
    multiply_quad<kTokens, 2>(sum, row, a);
    multiply_quad<kTokens, 3>(sum, row, a);
  }
  MARLIN_QQQ_UNROLL
  for (int t = 0; t < kTokens; ++t) {
    store_sums(sum[t], sums + t * kBlockColumns);
  }
}

TARGET void multiply(const ActivationSlice& activations, const void* weight, int64_t in_features, int32_t* sums) {
  using Tile = void (*)(const int8_t*, int64_t, const int8_t*, int64_t, int32_t*);
  static constexpr Tile kTile[kTokensPerTile] = {multiply_tile<1>, multiply_tile<2>, multiply_tile<3>,
                                                 multiply_tile<4>};
  const int64_t num_tiles = (activations.num_tokens + kTokensPerTile - 1) / kTokensPerTile;
  for (int bundle = 0; bundle < kBundles; ++bundle) {
    const int8_t* bundle_weight = static_cast<const int8_t*>(weight) + bundle * in_features / 16 * kBundleRowBytes;
    for (int64_t tile = 0; tile < num_tiles; ++tile) {
      const int64_t begin = activations.num_tokens * tile / num_tiles;
      const int64_t end = activations.num_tokens * (tile + 1) / num_tiles;
      kTile[end - begin - 1](activations.data + begin * activations.stride, activations.stride, bundle_weight,
                             in_features, sums + begin * kBlockColumns + 16 * bundle);
    }
  }
}

TARGET inline uint16x4_t to_bfloat16(float32x4_t value) {
  const uint32x4_t bits = vreinterpretq_u32_f32(value);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7FFF)), odd);
  const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x00400000));
  return vshrn_n_u32(vbslq_u32(vceqq_f32(value, value), rounded, quiet), 16);
}

TARGET void epilogue(const BlockEpilogue& block) {
  for (int64_t token = 0; token < block.num_tokens; ++token) {
    for (int bundle = 0; bundle < kBundles; ++bundle) {
      const BundleSums sum = load_sums(block.sums + token * kBlockColumns + 16 * bundle);
      // Element j of vector i into element i of vector j.
      const int32x4x2_t v01 = vtrnq_s32(sum.v0, sum.v1);
      const int32x4x2_t v23 = vtrnq_s32(sum.v2, sum.v3);
      const int32x4_t natural[4] = {vcombine_s32(vget_low_s32(v01.val[0]), vget_low_s32(v23.val[0])),
                                    vcombine_s32(vget_low_s32(v01.val[1]), vget_low_s32(v23.val[1])),
                                    vcombine_s32(vget_high_s32(v01.val[0]), vget_high_s32(v23.val[0])),
                                    vcombine_s32(vget_high_s32(v01.val[1]), vget_high_s32(v23.val[1]))};
      for (int j = 0; j < 4; ++j) {
        const int n = 16 * j + 8 * (bundle / 2) + 4 * (bundle % 2);
        const float32x4_t channel_scaled = vmulq_f32(vcvtq_f32_s32(natural[j]), vld1q_f32(block.channel_scale + n));
        float32x4_t value = vmulq_n_f32(channel_scaled, block.token_scale[token]);
        if (block.bias != nullptr) {
          value = vaddq_f32(value, vld1q_f32(block.bias + n));
        }
        const uint16x4_t rounded = block.output_type == format::OutputType::kFloat16
                                       ? vreinterpret_u16_f16(vcvt_f16_f32(value))
                                       : to_bfloat16(value);
        vst1_u16(block.output + token * block.output_stride + n, rounded);
      }
    }
  }
}

}  // namespace

const GemmBackend& neon_dotprod_backend() {
  static constexpr GemmBackend kBackend{/*weight_bytes=*/1,
                                        /*activation_bytes=*/0,
                                        /*most_streamed_tokens=*/0,
                                        no_initial_sum,
                                        /*prepare_activations=*/nullptr,
                                        dequantize,
                                        multiply,
                                        /*stream=*/nullptr,
                                        epilogue};
  return kBackend;
}

}  // namespace marlin_qqq::cpu

#endif  // defined(MARLIN_QQQ_HAVE_NEON_DOTPROD)
