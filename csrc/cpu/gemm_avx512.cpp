// AVX-512 VNNI backend (Cascade Lake, Ice Lake, Zen 4 and later).
//
// vpdpbusd multiplies unsigned by signed bytes, four to an int32, without saturation. The weights go in unsigned as
// W8 + 128 and the activations signed as they are, so every sum starts from -128 * sum(activations).
//
// Order of a block's sums: vector v = 2 * b + h holds, at 4 * j + i, column 16 * j + 8 * b + 4 * h + i. That is how the
// columns come out of a packed tile (lane c of it: words for columns c + 8 * b + 16 * j); the epilogue sorts them.
#include "cpu/gemm_backend.h"
#include "cpu/instruction_set.h"

#if defined(__x86_64__)

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12's own header initialises its "undefined" vectors with themselves (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include <cstring>

#include "format/limits.h"

#define TARGET MARLIN_QQQ_TARGET_AVX512_VNNI

namespace marlin_qqq::cpu {
namespace {

constexpr int64_t kRowsPerGroup = format::kGroupSize / format::kTileInFeatures;

// weight, k, column of one dequantised slice: [in_features / 4][vector v][4 * j + i][k % 4], unsigned.
constexpr int64_t kQuadBytes = 4 * kBlockColumns;

// The 16 words of column c of a tile come as lane (k % 16) / 4, element j; this order makes lane j hold 16 successive
// k.
TARGET inline __m512i transpose_index() {
  return _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
}

TARGET inline __m512i load_column(const int32_t* words) {
  return _mm512_permutexvar_epi32(transpose_index(), _mm512_loadu_si512(words));
}

// The two columns' weights, W8 + 128, in a column of words: lane j holds 16 successive k of column 16 * j + 8 * b + c.
struct ColumnPair {
  __m512i b0;
  __m512i b1;
};

// (words & mask) ^ flip
TARGET inline __m512i mask_and_flip(__m512i words, __m512i mask, __m512i flip) {
  return _mm512_ternarylogic_epi32(words, mask, flip, 0x6A);
}

TARGET inline ColumnPair channel_weights(__m512i words) {
  // 16 * code in the upper nibble, and 128 more by its top bit.
  const __m512i mask = _mm512_set1_epi32(static_cast<int>(0xF0F0F0F0));
  const __m512i flip = _mm512_set1_epi32(static_cast<int>(0x80808080));
  return {mask_and_flip(words, mask, flip), mask_and_flip(_mm512_slli_epi32(words, 4), mask, flip)};
}

// The sixteen weights, W8 + 128, that each code can mean in each of four columns 16 * j: lane j. `scale`: of column
// j = 0; the others follow two apart.
TARGET inline __m512i group_table(const float* scale) {
  const __m512 codes = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  // Adding 1.5 * 2^23 leaves the sum's unit at 1, so the addition itself rounds half to even, and the low byte is
  // the integer modulo 256. The product is exact before, fused or not. 128 more makes it unsigned.
  const __m512 magic = _mm512_set1_ps(12582912.0F + 128.0F);
  const __m512i low_byte = _mm512_set1_epi32(0xFF);
  __m512i bytes[4];
  MARLIN_QQQ_UNROLL
  for (int j = 0; j < 4; ++j) {
    const __m512 rounded = _mm512_fmadd_ps(codes, _mm512_set1_ps(scale[2 * j]), magic);
    bytes[j] = _mm512_and_si512(_mm512_castps_si512(rounded), low_byte);
  }
  // Packing works within lanes: lane l ends up with codes 4 * l .. of column 0, 1, 2, 3.
  const __m512i packed =
      _mm512_packus_epi16(_mm512_packus_epi32(bytes[0], bytes[1]), _mm512_packus_epi32(bytes[2], bytes[3]));
  return _mm512_permutexvar_epi32(transpose_index(), packed);
}

TARGET inline ColumnPair group_weights(__m512i words, __m512i table0, __m512i table1) {
  // Nibbles of column b = 0 in order of k: 0, 4, 1, 5; of b = 1: 2, 6, 3, 7. With bytes 1 and 2 of a word swapped each
  // half word has the first two nibbles of both columns as low nibbles and the last two as high nibbles.
  const __m512i swapped = _mm512_shuffle_epi8(
      words, _mm512_broadcast_i32x4(_mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15)));
  const __m512i low = _mm512_set1_epi32(0x00000F0F);
  const __m512i high = _mm512_set1_epi32(0x0F0F0000);
  constexpr int kAndOr = 0xEA;  // (a & b) | c
  const __m512i codes0 =
      _mm512_ternarylogic_epi32(swapped, low, _mm512_and_si512(_mm512_slli_epi32(swapped, 12), high), kAndOr);
  const __m512i codes1 = _mm512_ternarylogic_epi32(_mm512_srli_epi32(swapped, 4), high,
                                                   _mm512_and_si512(_mm512_srli_epi32(swapped, 16), low), kAndOr);
  return {_mm512_shuffle_epi8(table0, codes0), _mm512_shuffle_epi8(table1, codes1)};
}

// A block's 64 scales of one group as fp32, stored order: 8 * c + 2 * j + b. Not finite -> 0, so that every weight is
// 0.
TARGET inline void load_scales(const uint16_t* stored, float* scales) {
  MARLIN_QQQ_UNROLL
  for (int part = 0; part < 4; ++part) {
    const __m512 value = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(stored + 16 * part)));
    const __mmask16 odd = _mm512_fpclass_ps_mask(value, 0x01 | 0x08 | 0x10 | 0x80);  // NaNs and infinities
    _mm512_store_ps(scales + 16 * part, _mm512_mask_mov_ps(value, odd, _mm512_setzero_ps()));
  }
}

// 4 x 4 elements of each lane.
struct FourVectors {
  __m512i v[4];
};
TARGET inline FourVectors transpose_in_lanes(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab_low = _mm512_unpacklo_epi32(a, b);
  const __m512i ab_high = _mm512_unpackhi_epi32(a, b);
  const __m512i cd_low = _mm512_unpacklo_epi32(c, d);
  const __m512i cd_high = _mm512_unpackhi_epi32(c, d);
  return {{_mm512_unpacklo_epi64(ab_low, cd_low), _mm512_unpackhi_epi64(ab_low, cd_low),
           _mm512_unpacklo_epi64(ab_high, cd_high), _mm512_unpackhi_epi64(ab_high, cd_high)}};
}

TARGET int32_t initial_sum(const int8_t* activations, int64_t in_features) {
  const __m512i ones = _mm512_set1_epi8(1);
  __m512i sum = _mm512_setzero_si512();
  for (int64_t k = 0; k < in_features; k += 64) {
    sum = _mm512_dpbusd_epi32(sum, ones, _mm512_loadu_si512(activations + k));
  }
  return -128 * _mm512_reduce_add_epi32(sum);
}

template <bool kGrouped>
TARGET void dequantize_slice(const WeightSlice& slice, uint8_t* weight) {
  alignas(64) float scales[kBlockColumns] = {};
  const int64_t num_rows = slice.in_features / format::kTileInFeatures;
  for (int64_t first = 0; first < num_rows; first += kRowsPerGroup) {
    if (kGrouped) {
      load_scales(slice.group_scale + first / kRowsPerGroup * slice.group_stride, scales);
    }
    for (int h = 0; h < 2; ++h) {
      __m512i table[4][2];
      if (kGrouped) {
        MARLIN_QQQ_UNROLL
        for (int i = 0; i < 4; ++i) {
          table[i][0] = group_table(scales + 8 * (4 * h + i));
          table[i][1] = group_table(scales + 8 * (4 * h + i) + 1);
        }
      }
      for (int64_t row = first; row < first + kRowsPerGroup; ++row) {
        const int32_t* words = slice.packed + row * slice.words_per_row + 64 * h;
        ColumnPair pair[4];
        MARLIN_QQQ_UNROLL
        for (int i = 0; i < 4; ++i) {
          const __m512i column = load_column(words + 16 * i);
          pair[i] = kGrouped ? group_weights(column, table[i][0], table[i][1]) : channel_weights(column);
        }
        const FourVectors b0 = transpose_in_lanes(pair[0].b0, pair[1].b0, pair[2].b0, pair[3].b0);
        const FourVectors b1 = transpose_in_lanes(pair[0].b1, pair[1].b1, pair[2].b1, pair[3].b1);
        uint8_t* quads = weight + 4 * row * kQuadBytes + 64 * h;
        MARLIN_QQQ_UNROLL
        for (int quad = 0; quad < 4; ++quad) {
          _mm512_store_si512(quads + quad * kQuadBytes, b0.v[quad]);
          _mm512_store_si512(quads + quad * kQuadBytes + 128, b1.v[quad]);
        }
      }
    }
  }
}

TARGET void dequantize(const WeightSlice& slice, void* weight) {
  if (slice.group_scale != nullptr) {
    dequantize_slice<true>(slice, static_cast<uint8_t*>(weight));
  } else {
    dequantize_slice<false>(slice, static_cast<uint8_t*>(weight));
  }
}

// Six tokens x 64 columns are 24 accumulators, which with four weights and one activation fill the 32 registers.
constexpr int kTokensPerTile = 6;

template <int kTokens>
TARGET void multiply_tile(const int8_t* activations, int64_t stride, const uint8_t* weight, int64_t in_features,
                          int32_t* sums) {
  __m512i sum[kTokens][4];
  MARLIN_QQQ_UNROLL
  for (int t = 0; t < kTokens; ++t) {
    MARLIN_QQQ_UNROLL
    for (int v = 0; v < 4; ++v) {
      sum[t][v] = _mm512_load_si512(sums + kBlockColumns * t + 16 * v);
    }
  }
  for (int64_t k = 0; k < in_features; k += 4) {
    __m512i w[4];
    MARLIN_QQQ_UNROLL
    for (int v = 0; v < 4; ++v) {
      w[v] = _mm512_load_si512(weight + k / 4 * kQuadBytes + 64 * v);
    }
    MARLIN_QQQ_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      int32_t quad = 0;
      std::memcpy(&quad, activations + t * stride + k, sizeof(quad));
      const __m512i a = _mm512_set1_epi32(quad);
      MARLIN_QQQ_UNROLL
      for (int v = 0; v < 4; ++v) {
        sum[t][v] = _mm512_dpbusd_epi32(sum[t][v], w[v], a);
      }
    }
  }
  MARLIN_QQQ_UNROLL
  for (int t = 0; t < kTokens; ++t) {
    MARLIN_QQQ_UNROLL
    for (int v = 0; v < 4; ++v) {
      _mm512_store_si512(sums + kBlockColumns * t + 16 * v, sum[t][v]);
    }
  }
}

TARGET void multiply(const ActivationSlice& activations, const void* weight, int64_t in_features, int32_t* sums) {
  using Tile = void (*)(const int8_t*, int64_t, const uint8_t*, int64_t, int32_t*);
  static constexpr Tile kTile[kTokensPerTile] = {multiply_tile<1>, multiply_tile<2>, multiply_tile<3>,
                                                 multiply_tile<4>, multiply_tile<5>, multiply_tile<6>};
  // Tiles as even as can be: 7 tokens are 4 + 3, not 6 + 1.
  const int64_t num_tiles = (activations.num_tokens + kTokensPerTile - 1) / kTokensPerTile;
  for (int64_t tile = 0; tile < num_tiles; ++tile) {
    const int64_t begin = activations.num_tokens * tile / num_tiles;
    const int64_t end = activations.num_tokens * (tile + 1) / num_tiles;
    kTile[end - begin - 1](activations.data + begin * activations.stride, activations.stride,
                           static_cast<const uint8_t*>(weight), in_features, sums + begin * kBlockColumns);
  }
}

constexpr int kMostStreamedTokens = 3;

template <int kTokens, bool kGrouped>
TARGET void stream_slice(const ActivationSlice& activations, const WeightSlice& slice, int32_t* sums) {
  alignas(64) float scales[kBlockColumns] = {};
  const int64_t num_rows = slice.in_features / format::kTileInFeatures;
  for (int h = 0; h < 2; ++h) {
    __m512i sum[kTokens][2][4];  // lane j, four partial sums of column 16 * j + 8 * b + 4 * h + i
    MARLIN_QQQ_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      MARLIN_QQQ_UNROLL
      for (int i = 0; i < 4; ++i) {
        sum[t][0][i] = _mm512_setzero_si512();
        sum[t][1][i] = _mm512_setzero_si512();
      }
    }
    for (int64_t first = 0; first < num_rows; first += kRowsPerGroup) {
      alignas(64) __m512i table[4][2];
      if (kGrouped) {
        load_scales(slice.group_scale + first / kRowsPerGroup * slice.group_stride, scales);
        MARLIN_QQQ_UNROLL
        for (int i = 0; i < 4; ++i) {
          table[i][0] = group_table(scales + 8 * (4 * h + i));
          table[i][1] = group_table(scales + 8 * (4 * h + i) + 1);
        }
      }
      for (int64_t row = first; row < first + kRowsPerGroup; ++row) {
        const int32_t* words = slice.packed + row * slice.words_per_row + 64 * h;
        __m512i a[kTokens];
        MARLIN_QQQ_UNROLL
        for (int t = 0; t < kTokens; ++t) {
          const int8_t* data = activations.data + t * activations.stride + row * format::kTileInFeatures;
          a[t] = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(data)));
        }
        MARLIN_QQQ_UNROLL
        for (int i = 0; i < 4; ++i) {
          const __m512i column = load_column(words + 16 * i);
          const ColumnPair pair = kGrouped ? group_weights(column, table[i][0], table[i][1]) : channel_weights(column);
          MARLIN_QQQ_UNROLL
          for (int t = 0; t < kTokens; ++t) {
            sum[t][0][i] = _mm512_dpbusd_epi32(sum[t][0][i], pair.b0, a[t]);
            sum[t][1][i] = _mm512_dpbusd_epi32(sum[t][1][i], pair.b1, a[t]);
          }
        }
      }
    }
    MARLIN_QQQ_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      MARLIN_QQQ_UNROLL
      for (int b = 0; b < 2; ++b) {
        const FourVectors parts = transpose_in_lanes(sum[t][b][0], sum[t][b][1], sum[t][b][2], sum[t][b][3]);
        int32_t* total = sums + kBlockColumns * t + 16 * (2 * b + h);
        const __m512i halves[2] = {_mm512_add_epi32(parts.v[0], parts.v[1]), _mm512_add_epi32(parts.v[2], parts.v[3])};
        _mm512_store_si512(total, _mm512_add_epi32(_mm512_load_si512(total), _mm512_add_epi32(halves[0], halves[1])));
      }
    }
  }
}

TARGET void stream(const ActivationSlice& activations, const WeightSlice& slice, int32_t* sums) {
  using Stream = void (*)(const ActivationSlice&, const WeightSlice&, int32_t*);
  static constexpr Stream kStream[kMostStreamedTokens][2] = {{stream_slice<1, false>, stream_slice<1, true>},
                                                             {stream_slice<2, false>, stream_slice<2, true>},
                                                             {stream_slice<3, false>, stream_slice<3, true>}};
  kStream[activations.num_tokens - 1][slice.group_scale != nullptr ? 1 : 0](activations, slice, sums);
}

// fp32 to bf16, round to nearest even. vcvtneps2bf16 would flush subnormals.
TARGET inline __m256i to_bfloat16(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x00400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
}

TARGET void epilogue(const BlockEpilogue& block) {
  for (int64_t token = 0; token < block.num_tokens; ++token) {
    const int32_t* sums = block.sums + token * kBlockColumns;
    const __m512i v0 = _mm512_load_si512(sums);
    const __m512i v1 = _mm512_load_si512(sums + 16);
    const __m512i v2 = _mm512_load_si512(sums + 32);
    const __m512i v3 = _mm512_load_si512(sums + 48);
    // Lane j of vector v belongs into lane v of vector j.
    const __m512i low01 = _mm512_shuffle_i32x4(v0, v1, 0x44);
    const __m512i high01 = _mm512_shuffle_i32x4(v0, v1, 0xEE);
    const __m512i low23 = _mm512_shuffle_i32x4(v2, v3, 0x44);
    const __m512i high23 = _mm512_shuffle_i32x4(v2, v3, 0xEE);
    const __m512i natural[4] = {_mm512_shuffle_i32x4(low01, low23, 0x88), _mm512_shuffle_i32x4(low01, low23, 0xDD),
                                _mm512_shuffle_i32x4(high01, high23, 0x88), _mm512_shuffle_i32x4(high01, high23, 0xDD)};
    const __m512 token_scale = _mm512_set1_ps(block.token_scale[token]);
    uint16_t* output = block.output + token * block.output_stride;
    MARLIN_QQQ_UNROLL
    for (int j = 0; j < 4; ++j) {
      const __m512 channel_scaled =
          _mm512_mul_ps(_mm512_cvtepi32_ps(natural[j]), _mm512_load_ps(block.channel_scale + 16 * j));
      __m512 value = _mm512_mul_ps(channel_scaled, token_scale);
      if (block.bias != nullptr) {
        value = _mm512_add_ps(value, _mm512_load_ps(block.bias + 16 * j));
      }
      const __m256i rounded = block.output_type == format::OutputType::kFloat16
                                  ? _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
                                  : to_bfloat16(value);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(output + 16 * j), rounded);
    }
  }
}

}  // namespace

const GemmBackend& avx512_vnni_backend() {
  static constexpr GemmBackend kBackend{/*weight_bytes=*/1,
                                        /*activation_bytes=*/0,
                                        kMostStreamedTokens,
                                        initial_sum,
                                        /*prepare_activations=*/nullptr,
                                        dequantize,
                                        multiply,
                                        stream,
                                        epilogue};
  return kBackend;
}

}  // namespace marlin_qqq::cpu

#endif  // defined(__x86_64__)
