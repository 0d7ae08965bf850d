// AVX2 and AVX-VNNI backends.
//
// AVX2's byte multiplier saturates, so AVX2 widens both sides to 16 bits and uses vpmaddwd, which is exact. AVX-VNNI
// has vpdpbusd, which is exact too: weights unsigned as W8 + 128, activations signed, sums from -128 *
// sum(activations).
//
// A vector holds 16 (bytes) or 8 (16 bits) successive k of two columns, one a lane. Vectors go in bundles of four:
// bundle (b, h, p) vector i: columns 16 * p + 8 * b + 4 * h + i and, in the upper lane, 32 more. Sums: natural order.
#include "cpu/gemm_backend.h"
#include "cpu/instruction_set.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include "format/limits.h"

#define TARGET MARLIN_QQQ_TARGET_AVX2

namespace marlin_qqq::cpu {
namespace {

constexpr int64_t kRowsPerGroup = format::kGroupSize / format::kTileInFeatures;
constexpr int kBundles = 8;
constexpr int kTokensPerTile = 3;  // 12 accumulators, 3 activations and a weight fill the 16 registers

constexpr int bundle_index(int b, int h, int p) { return 4 * b + 2 * h + p; }
constexpr int bundle_first_column(int bundle) { return 16 * (bundle % 2) + 8 * (bundle / 4) + 4 * (bundle / 2 % 2); }

// A column of a tile, 16 words for four quads of k x four columns 16 * j, as columns j and j + 2 in two lanes.
struct ColumnWords {
  __m256i p[2];  // j = p and p + 2
};
TARGET inline ColumnWords load_column(const int32_t* words) {
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i low = _mm256_permutevar8x32_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(words)), order);
  const __m256i high =
      _mm256_permutevar8x32_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(words + 8)), order);
  return {{_mm256_unpacklo_epi64(low, high), _mm256_unpackhi_epi64(low, high)}};
}

struct ColumnPair {
  __m256i b[2];
};

TARGET inline ColumnPair channel_weights(__m256i words) {
  const __m256i mask = _mm256_set1_epi32(static_cast<int>(0xF0F0F0F0));
  return {{_mm256_and_si256(words, mask), _mm256_and_si256(_mm256_slli_epi32(words, 4), mask)}};
}

// The sixteen weights that each code can mean in two columns, one a lane.
TARGET inline __m256i group_table(float scale_low, float scale_high) {
  const __m256 codes[2] = {_mm256_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1), _mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7)};
  // 1.5 * 2^23: see gemm_avx512.cpp.
  const __m256 magic = _mm256_set1_ps(12582912.0F);
  const __m256i low_byte = _mm256_set1_epi32(0xFF);
  const float scales[2] = {scale_low, scale_high};
  __m256i packed[2];
  MARLIN_QQQ_UNROLL
  for (int lane = 0; lane < 2; ++lane) {
    const __m256 scale = _mm256_set1_ps(scales[lane]);
    const __m256i low = _mm256_castps_si256(_mm256_add_ps(_mm256_mul_ps(codes[0], scale), magic));
    const __m256i high = _mm256_castps_si256(_mm256_add_ps(_mm256_mul_ps(codes[1], scale), magic));
    packed[lane] = _mm256_packus_epi32(_mm256_and_si256(low, low_byte), _mm256_and_si256(high, low_byte));
  }
  return _mm256_permutevar8x32_epi32(_mm256_packus_epi16(packed[0], packed[1]),
                                     _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

TARGET inline ColumnPair group_weights(__m256i words, __m256i table0, __m256i table1) {
  // Order of nibbles: see gemm_avx512.cpp.
  const __m256i swapped =
      _mm256_shuffle_epi8(words, _mm256_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15,  //
                                                  0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15));
  const __m256i low = _mm256_set1_epi32(0x00000F0F);
  const __m256i high = _mm256_set1_epi32(0x0F0F0000);
  const __m256i codes0 =
      _mm256_or_si256(_mm256_and_si256(swapped, low), _mm256_and_si256(_mm256_slli_epi32(swapped, 12), high));
  const __m256i codes1 = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi32(swapped, 4), high),
                                         _mm256_and_si256(_mm256_srli_epi32(swapped, 16), low));
  return {{_mm256_shuffle_epi8(table0, codes0), _mm256_shuffle_epi8(table1, codes1)}};
}

// A block's 64 scales of one group as fp32, stored order: 8 * c + 2 * j + b. Not finite -> 0, so that every weight is
// 0.
TARGET inline void load_scales(const uint16_t* stored, float* scales) {
  const __m256 largest = _mm256_set1_ps(65504.0F);
  for (int part = 0; part < 8; ++part) {
    const __m256 value = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(stored + 8 * part)));
    const __m256 magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0F), value);
    _mm256_store_ps(scales + 8 * part, _mm256_and_ps(value, _mm256_cmp_ps(magnitude, largest, _CMP_LE_OQ)));
  }
}

// weight: [bundle][run of 16 k][vector i], 32 unsigned bytes each (kBytes), or [bundle][run of 8 k][vector i], 16 int16
// each.
template <bool kGrouped, bool kBytes>
TARGET inline void dequantize_slice(const WeightSlice& slice, char* weight) {
  constexpr int64_t kVectorBytes = kBytes ? 32 : 64;
  const int64_t num_rows = slice.in_features / format::kTileInFeatures;
  const int64_t bundle_bytes = num_rows * 4 * kVectorBytes;
  const __m256i flip = _mm256_set1_epi8(kBytes ? -128 : 0);
  alignas(32) float scales[kBlockColumns] = {};
  for (int64_t first = 0; first < num_rows; first += kRowsPerGroup) {
    if (kGrouped) {
      load_scales(slice.group_scale + first / kRowsPerGroup * slice.group_stride, scales);
    }
    for (int c = 0; c < 8; ++c) {
      __m256i table[2][2] = {};
      if (kGrouped) {
        for (int p = 0; p < 2; ++p) {
          for (int b = 0; b < 2; ++b) {
            const float* scale = scales + 8 * c + 2 * p + b;
            table[p][b] = _mm256_xor_si256(group_table(scale[0], scale[4]), flip);
          }
        }
      }
      for (int64_t row = first; row < first + kRowsPerGroup; ++row) {
        const ColumnWords words = load_column(slice.packed + row * slice.words_per_row + 16 * c);
        MARLIN_QQQ_UNROLL
        for (int p = 0; p < 2; ++p) {
          ColumnPair pair;
          if (kGrouped) {
            pair = group_weights(words.p[p], table[p][0], table[p][1]);
          } else {
            pair = channel_weights(words.p[p]);
            pair = {{_mm256_xor_si256(pair.b[0], flip), _mm256_xor_si256(pair.b[1], flip)}};
          }
          MARLIN_QQQ_UNROLL
          for (int b = 0; b < 2; ++b) {
            char* vector = weight + bundle_index(b, c / 4, p) * bundle_bytes + row * 4 * kVectorBytes + c % 4 * 32;
            if (kBytes) {
              _mm256_store_si256(reinterpret_cast<__m256i*>(vector), pair.b[b]);
            } else {
              const __m256i zero = _mm256_setzero_si256();
              const __m256i low = _mm256_srai_epi16(_mm256_unpacklo_epi8(zero, pair.b[b]), 8);
              const __m256i high = _mm256_srai_epi16(_mm256_unpackhi_epi8(zero, pair.b[b]), 8);
              _mm256_store_si256(reinterpret_cast<__m256i*>(vector), low);
              _mm256_store_si256(reinterpret_cast<__m256i*>(vector + 128), high);
            }
          }
        }
      }
    }
  }
}

template <bool kBytes>
TARGET void dequantize(const WeightSlice& slice, void* weight) {
  if (slice.group_scale != nullptr) {
    dequantize_slice<true, kBytes>(slice, static_cast<char*>(weight));
  } else {
    dequantize_slice<false, kBytes>(slice, static_cast<char*>(weight));
  }
}

// Partial sums of one token and one bundle. Named members, not an array: GCC 12 keeps an array in memory and stores to
// it on every iteration, which halves the speed.
struct BundleSums {
  __m256i v0, v1, v2, v3;
};

TARGET inline BundleSums no_sums() {
  const __m256i zero = _mm256_setzero_si256();
  return {zero, zero, zero, zero};
}

// No instruction. Without it GCC 12 gives some sums a place in memory and stores to it on every iteration.
TARGET inline void keep_in_registers(BundleSums& a, BundleSums& b, BundleSums& c) {
  asm("" : "+x"(a.v0), "+x"(a.v1), "+x"(a.v2), "+x"(a.v3), "+x"(b.v0), "+x"(b.v1));
  asm("" : "+x"(b.v2), "+x"(b.v3), "+x"(c.v0), "+x"(c.v1), "+x"(c.v2), "+x"(c.v3));
}

// Into the sums of the bundle's eight columns.
TARGET inline void add_sums(const BundleSums& partial, int32_t* sums) {
  const __m256i total = _mm256_hadd_epi32(_mm256_hadd_epi32(partial.v0, partial.v1),  //
                                          _mm256_hadd_epi32(partial.v2, partial.v3));
  auto* low = reinterpret_cast<__m128i*>(sums);
  auto* high = reinterpret_cast<__m128i*>(sums + 32);
  _mm_store_si128(low, _mm_add_epi32(_mm_load_si128(low), _mm256_castsi256_si128(total)));
  _mm_store_si128(high, _mm_add_epi32(_mm_load_si128(high), _mm256_extracti128_si256(total, 1)));
}

using Tile = void (*)(const int8_t* activations, int64_t stride, const char* weight, int64_t in_features,
                      int32_t* sums);

inline void multiply_tiles(const Tile (&tile)[kTokensPerTile], const ActivationSlice& activations, const void* weight,
                           int64_t bundle_bytes, int64_t in_features, int32_t* sums) {
  const int64_t num_tiles = (activations.num_tokens + kTokensPerTile - 1) / kTokensPerTile;
  for (int bundle = 0; bundle < kBundles; ++bundle) {
    const char* bundle_weight = static_cast<const char*>(weight) + bundle * bundle_bytes;
    for (int64_t i = 0; i < num_tiles; ++i) {
      const int64_t begin = activations.num_tokens * i / num_tiles;
      const int64_t end = activations.num_tokens * (i + 1) / num_tiles;
      tile[end - begin - 1](activations.data + begin * activations.stride, activations.stride, bundle_weight,
                            in_features, sums + begin * kBlockColumns + bundle_first_column(bundle));
    }
  }
}

TARGET inline __m256i broadcast_16_bytes(const int8_t* data) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(data)));
}

TARGET inline void multiply_add_words(BundleSums& sum, __m256i a, const __m256i* w) {
  sum.v0 = _mm256_add_epi32(sum.v0, _mm256_madd_epi16(a, _mm256_load_si256(w)));
  sum.v1 = _mm256_add_epi32(sum.v1, _mm256_madd_epi16(a, _mm256_load_si256(w + 1)));
  sum.v2 = _mm256_add_epi32(sum.v2, _mm256_madd_epi16(a, _mm256_load_si256(w + 2)));
  sum.v3 = _mm256_add_epi32(sum.v3, _mm256_madd_epi16(a, _mm256_load_si256(w + 3)));
}

// activations: int16, stride in bytes.
template <int kTokens>
TARGET void multiply_tile_words(const int8_t* activations, int64_t stride, const char* weight, int64_t in_features,
                                int32_t* sums) {
  BundleSums sum0 = no_sums();
  BundleSums sum1 = no_sums();
  BundleSums sum2 = no_sums();
  int64_t k = 0;
  do {
    const int8_t* data = activations + 2 * k;
    const auto* w = reinterpret_cast<const __m256i*>(weight + k / 8 * 128);
    multiply_add_words(sum0, broadcast_16_bytes(data), w);
    if (kTokens > 1) multiply_add_words(sum1, broadcast_16_bytes(data + stride), w);
    if (kTokens > 2) multiply_add_words(sum2, broadcast_16_bytes(data + 2 * stride), w);
    keep_in_registers(sum0, sum1, sum2);
    k += 8;
  } while (k < in_features);
  add_sums(sum0, sums);
  if (kTokens > 1) add_sums(sum1, sums + kBlockColumns);
  if (kTokens > 2) add_sums(sum2, sums + 2 * kBlockColumns);
}

TARGET void multiply_words(const ActivationSlice& activations, const void* weight, int64_t in_features, int32_t* sums) {
  static constexpr Tile kTile[kTokensPerTile] = {multiply_tile_words<1>, multiply_tile_words<2>,
                                                 multiply_tile_words<3>};
  multiply_tiles(kTile, activations, weight, in_features * 16, in_features, sums);
}

// in_features % 128 == 0
TARGET void widen_activations(const ActivationSlice& activations, int64_t in_features, void* prepared) {
  for (int64_t token = 0; token < activations.num_tokens; ++token) {
    const int8_t* source = activations.data + token * activations.stride;
    auto* destination = static_cast<int16_t*>(prepared) + token * in_features;
    for (int64_t k = 0; k < in_features; k += 16) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + k));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(destination + k), _mm256_cvtepi8_epi16(bytes));
    }
  }
}

int32_t no_initial_sum(const int8_t*, int64_t) { return 0; }

TARGET inline __m128i to_bfloat16(__m256 value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x00400000));
  const __m256i upper = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1));
}

TARGET void epilogue(const BlockEpilogue& block) {
  for (int64_t token = 0; token < block.num_tokens; ++token) {
    const int32_t* sums = block.sums + token * kBlockColumns;
    const __m256 token_scale = _mm256_set1_ps(block.token_scale[token]);
    uint16_t* output = block.output + token * block.output_stride;
    for (int j = 0; j < kBlockColumns; j += 8) {
      const __m256 sum = _mm256_cvtepi32_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(sums + j)));
      __m256 value = _mm256_mul_ps(_mm256_mul_ps(sum, _mm256_load_ps(block.channel_scale + j)), token_scale);
      if (block.bias != nullptr) {
        value = _mm256_add_ps(value, _mm256_load_ps(block.bias + j));
      }
      const __m128i rounded = block.output_type == format::OutputType::kFloat16
                                  ? _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT)
                                  : to_bfloat16(value);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(output + j), rounded);
    }
  }
}

#if defined(MARLIN_QQQ_HAVE_AVX_VNNI)
#define TARGET_VNNI MARLIN_QQQ_TARGET_AVX_VNNI

TARGET_VNNI inline void multiply_add_bytes(BundleSums& sum, __m256i a, const __m256i* w) {
  sum.v0 = _mm256_dpbusd_avx_epi32(sum.v0, _mm256_load_si256(w), a);
  sum.v1 = _mm256_dpbusd_avx_epi32(sum.v1, _mm256_load_si256(w + 1), a);
  sum.v2 = _mm256_dpbusd_avx_epi32(sum.v2, _mm256_load_si256(w + 2), a);
  sum.v3 = _mm256_dpbusd_avx_epi32(sum.v3, _mm256_load_si256(w + 3), a);
}

template <int kTokens>
TARGET_VNNI void multiply_tile_bytes(const int8_t* activations, int64_t stride, const char* weight, int64_t in_features,
                                     int32_t* sums) {
  BundleSums sum0 = no_sums();
  BundleSums sum1 = no_sums();
  BundleSums sum2 = no_sums();
  int64_t k = 0;
  do {
    const int8_t* data = activations + k;
    const auto* w = reinterpret_cast<const __m256i*>(weight + k / 16 * 128);
    multiply_add_bytes(sum0, broadcast_16_bytes(data), w);
    if (kTokens > 1) multiply_add_bytes(sum1, broadcast_16_bytes(data + stride), w);
    if (kTokens > 2) multiply_add_bytes(sum2, broadcast_16_bytes(data + 2 * stride), w);
    keep_in_registers(sum0, sum1, sum2);
    k += 16;
  } while (k < in_features);
  add_sums(sum0, sums);
  if (kTokens > 1) add_sums(sum1, sums + kBlockColumns);
  if (kTokens > 2) add_sums(sum2, sums + 2 * kBlockColumns);
}

TARGET_VNNI void multiply_bytes(const ActivationSlice& activations, const void* weight, int64_t in_features,
                                int32_t* sums) {
  static constexpr Tile kTile[kTokensPerTile] = {multiply_tile_bytes<1>, multiply_tile_bytes<2>,
                                                 multiply_tile_bytes<3>};
  multiply_tiles(kTile, activations, weight, in_features * 8, in_features, sums);
}

TARGET_VNNI int32_t initial_sum(const int8_t* activations, int64_t in_features) {
  __m256i sum = _mm256_setzero_si256();
  for (int64_t k = 0; k < in_features; k += 32) {
    const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(activations + k));
    sum = _mm256_dpbusd_avx_epi32(sum, _mm256_set1_epi8(1), a);
  }
  alignas(32) int32_t parts[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(parts), sum);
  int32_t total = 0;
  for (const int32_t part : parts) {
    total += part;
  }
  return -128 * total;
}
#endif  // MARLIN_QQQ_HAVE_AVX_VNNI

}  // namespace

const GemmBackend& avx2_backend() {
  static constexpr GemmBackend kBackend{/*weight_bytes=*/2,
                                        /*activation_bytes=*/2,
                                        /*most_streamed_tokens=*/0, no_initial_sum, widen_activations,
                                        dequantize<false>,          multiply_words,
                                        /*stream=*/nullptr,         epilogue};
  return kBackend;
}

const GemmBackend& avx_vnni_backend() {
#if defined(MARLIN_QQQ_HAVE_AVX_VNNI)
  static constexpr GemmBackend kBackend{/*weight_bytes=*/1,
                                        /*activation_bytes=*/0,
                                        /*most_streamed_tokens=*/0,
                                        initial_sum,
                                        /*prepare_activations=*/nullptr,
                                        dequantize<true>,
                                        multiply_bytes,
                                        /*stream=*/nullptr,
                                        epilogue};
  return kBackend;
#else
  return avx2_backend();
#endif
}

}  // namespace marlin_qqq::cpu

#endif  // defined(__x86_64__)
