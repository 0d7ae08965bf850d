// quantize_per_token on the CPU: two passes over a row, the largest magnitude and then the rounding.
//
// Magnitudes of floating-point numbers order like their bits without the sign, with infinity above all numbers and NaN
// above infinity. So the first pass is an integer maximum, in the row's own type.
#include <algorithm>
#include <cstring>
#include <limits>

#include "cpu/instruction_set.h"
#include "cpu/kernels.h"
#include "cpu/thread_pool.h"
#include "format/float16.h"
#include "format/token_quantization.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace marlin_qqq::cpu {
namespace {

// The three element types: their bits, and how to read them as fp32.
struct Float16 {
  using Bits = uint16_t;
  static float to_float(Bits bits) {
#if defined(__aarch64__)
    __fp16 value;  // one instruction, and loops over it vectorise
    std::memcpy(&value, &bits, sizeof(value));
    return value;
#else
    return format::float16_to_float(bits);
#endif
  }
};
struct BFloat16 {
  using Bits = uint16_t;
  static float to_float(Bits bits) { return format::bfloat16_to_float(bits); }
};
struct Float32 {
  using Bits = uint32_t;
  static float to_float(Bits bits) { return format::float_from_bits(bits); }
};

template <typename Bits>
inline constexpr Bits kMagnitudeMask = std::numeric_limits<Bits>::max() >> 1;

template <typename Element>
typename Element::Bits largest_magnitude(const typename Element::Bits* row, int64_t begin, int64_t end) {
  typename Element::Bits largest = 0;
  for (int64_t i = begin; i < end; ++i) {
    const auto magnitude = static_cast<typename Element::Bits>(row[i] & kMagnitudeMask<typename Element::Bits>);
    largest = std::max(largest, magnitude);
  }
  return largest;
}

template <typename Element>
void quantize_values(const typename Element::Bits* row, int64_t begin, int64_t end, float multiplier,
                     int8_t* quantized) {
  for (int64_t i = begin; i < end; ++i) {
    quantized[i] = format::quantize_value(Element::to_float(row[i]), multiplier);
  }
}

#if defined(__x86_64__)
#define TARGET MARLIN_QQQ_TARGET_AVX2

TARGET inline __m256i load_bits(const void* data) { return _mm256_loadu_si256(static_cast<const __m256i*>(data)); }

// Eight elements as fp32.
template <typename Element>
TARGET inline __m256 load_floats(const typename Element::Bits* data);
template <>
TARGET inline __m256 load_floats<Float32>(const uint32_t* data) {
  return _mm256_castsi256_ps(load_bits(data));
}
template <>
TARGET inline __m256 load_floats<Float16>(const uint16_t* data) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(data)));
}
template <>
TARGET inline __m256 load_floats<BFloat16>(const uint16_t* data) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(data)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

TARGET inline __m256i maximum(__m256i a, __m256i b, uint16_t) { return _mm256_max_epu16(a, b); }
TARGET inline __m256i maximum(__m256i a, __m256i b, uint32_t) { return _mm256_max_epu32(a, b); }
TARGET inline __m256i broadcast(uint16_t value) { return _mm256_set1_epi16(static_cast<int16_t>(value)); }
TARGET inline __m256i broadcast(uint32_t value) { return _mm256_set1_epi32(static_cast<int32_t>(value)); }

template <typename Element>
TARGET typename Element::Bits largest_magnitude_avx2(const typename Element::Bits* row, int64_t in_features) {
  using Bits = typename Element::Bits;
  constexpr int64_t kLanes = 32 / sizeof(Bits);
  const __m256i mask = broadcast(kMagnitudeMask<Bits>);
  __m256i largest[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()};
  int64_t i = 0;
  for (; i + 4 * kLanes <= in_features; i += 4 * kLanes) {
    for (int part = 0; part < 4; ++part) {
      largest[part] = maximum(largest[part], _mm256_and_si256(load_bits(row + i + part * kLanes), mask), Bits{});
    }
  }
  alignas(32) Bits lanes[4 * kLanes];
  std::memcpy(lanes, largest, sizeof(lanes));
  const Bits vectors = *std::max_element(lanes, lanes + 4 * kLanes);
  return std::max(vectors, largest_magnitude<Element>(row, i, in_features));
}

template <typename Element>
TARGET inline __m256i quantize_eight(const typename Element::Bits* data, __m256 multiplier) {
  return _mm256_cvtps_epi32(_mm256_mul_ps(load_floats<Element>(data), multiplier));  // rounds half to even
}

template <typename Element>
TARGET void quantize_values_avx2(const typename Element::Bits* row, int64_t in_features, float multiplier,
                                 int8_t* quantized) {
  const __m256 factor = _mm256_set1_ps(multiplier);
  int64_t i = 0;
  for (; i + 32 <= in_features; i += 32) {
    // Packing saturates, and interleaves lanes: put the dwords back in order.
    const __m256i low =
        _mm256_packs_epi32(quantize_eight<Element>(row + i, factor), quantize_eight<Element>(row + i + 8, factor));
    const __m256i high = _mm256_packs_epi32(quantize_eight<Element>(row + i + 16, factor),
                                            quantize_eight<Element>(row + i + 24, factor));
    const __m256i bytes =
        _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(quantized + i), bytes);
  }
  quantize_values<Element>(row, i, in_features, multiplier, quantized);
}
#endif  // defined(__x86_64__)

template <typename Element>
void quantize_row(const typename Element::Bits* row, int64_t in_features, bool vectorised, int8_t* quantized,
                  float* token_scale) {
  typename Element::Bits largest = 0;
#if defined(__x86_64__)
  if (vectorised) {
    largest = largest_magnitude_avx2<Element>(row, in_features);
  } else
#endif
  {
    largest = largest_magnitude<Element>(row, 0, in_features);
  }

  const format::TokenScale scale = format::token_scale(Element::to_float(largest));
  *token_scale = scale.scale;
  if (scale.multiplier == 0.0F) {
    std::fill_n(quantized, in_features, int8_t{0});
    return;
  }

#if defined(__x86_64__)
  if (vectorised) {
    quantize_values_avx2<Element>(row, in_features, scale.multiplier, quantized);
    return;
  }
#endif
  (void)vectorised;
  quantize_values<Element>(row, 0, in_features, scale.multiplier, quantized);
}

template <typename Element>
void quantize_rows(const void* x, int64_t num_tokens, int64_t in_features, int64_t row_stride, int8_t* quantized,
                   float* token_scale, int num_threads) {
  // A task, and a thread's least share, is a few microseconds of work.
  constexpr int64_t kElementsPerTask = 32768;
  const int64_t rows_per_task = std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(in_features, 1));
  const bool vectorised = instruction_set() != InstructionSet::kGeneric;
  auto quantize_task = [&](int64_t task) {
    const int64_t end = std::min(num_tokens, (task + 1) * rows_per_task);
    for (int64_t row = task * rows_per_task; row < end; ++row) {
      quantize_row<Element>(static_cast<const typename Element::Bits*>(x) + row * row_stride, in_features, vectorised,
                            quantized + row * in_features, token_scale + row);
    }
  };
  parallel_for((num_tokens + rows_per_task - 1) / rows_per_task, num_threads, quantize_task);
}

}  // namespace

void quantize_per_token(const void* x, InputType input_type, int64_t num_tokens, int64_t in_features,
                        int64_t row_stride, int8_t* quantized, float* token_scale, int num_threads) {
  const auto quantize = input_type == InputType::kFloat16    ? quantize_rows<Float16>
                        : input_type == InputType::kBFloat16 ? quantize_rows<BFloat16>
                                                             : quantize_rows<Float32>;
  quantize(x, num_tokens, in_features, row_stride, quantized, token_scale, num_threads);
}

}  // namespace marlin_qqq::cpu
