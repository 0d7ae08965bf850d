// The ops as the format's document states them, one value at a time, in int64 and double. Shares no code with
// csrc/format or csrc/cpu: a mistake there cannot hide here.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace marlin_qqq::testkit {

// fp16, bf16

inline double float16_value(uint16_t bits) {
  const int exponent = bits >> 10 & 31;
  const double mantissa = bits & 1023;
  const double sign = (bits >> 15) != 0 ? -1.0 : 1.0;
  if (exponent == 31) {
    return mantissa == 0 ? sign * std::numeric_limits<double>::infinity() : std::numeric_limits<double>::quiet_NaN();
  }
  return sign * (exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25));
}

inline double bfloat16_value(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value = 0;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

// Nearest number with `mantissa_bits` stored bits and the given exponent range, ties to even, as sign, exponent,
// mantissa fields of 16 bits in all. NaN: any NaN would do, callers compare with is_nan.
inline uint16_t round_to_16_bits(double value, int mantissa_bits, int smallest_exponent, int largest_exponent) {
  const auto sign = static_cast<uint16_t>(std::signbit(value) ? 0x8000 : 0);
  const double magnitude = std::fabs(value);
  const auto infinity =
      static_cast<uint16_t>((largest_exponent - smallest_exponent + 2) << mantissa_bits);  // all exponent bits set
  if (std::isnan(value)) {
    return static_cast<uint16_t>(sign | infinity | 1 << (mantissa_bits - 1));
  }
  if (magnitude == 0) {
    return sign;
  }
  int exponent = std::isinf(magnitude) ? largest_exponent + 1 : std::ilogb(magnitude);
  exponent = exponent < smallest_exponent ? smallest_exponent : exponent;
  if (exponent > largest_exponent) {
    return sign | infinity;
  }
  // Steps from zero in units of the last place; a carry into the next exponent counts on correctly.
  const double units = std::nearbyint(std::ldexp(magnitude, mantissa_bits - exponent));
  const auto steps =
      static_cast<uint32_t>(units) + (static_cast<uint32_t>(exponent - smallest_exponent) << mantissa_bits);
  return static_cast<uint16_t>(sign | steps);
}

inline uint16_t to_float16(double value) { return round_to_16_bits(value, 10, -14, 15); }
inline uint16_t to_bfloat16(double value) { return round_to_16_bits(value, 7, -126, 127); }

inline bool is_float16_nan(uint16_t bits) { return (bits & 0x7FFF) > 0x7C00; }
inline bool is_bfloat16_nan(uint16_t bits) { return (bits & 0x7FFF) > 0x7F80; }

// The product

struct ReferenceProblem {
  int64_t num_tokens = 0;
  int64_t out_features = 0;
  int64_t in_features = 0;
  bool grouped = false;
  std::vector<int8_t> activations;    // [num_tokens][in_features]
  std::vector<int8_t> codes;          // [in_features][out_features]
  std::vector<float> token_scale;     // [num_tokens]
  std::vector<float> channel_scale;   // [out_features], natural order
  std::vector<uint16_t> group_scale;  // fp16 [in_features / 128][out_features], natural order
  std::vector<uint16_t> bias;         // [out_features] or empty
  bool bfloat16 = false;
};

// round_half_even(code * scale) as int8, modulo 256.
inline int64_t reference_weight(int code, double group_scale) {
  const auto rounded = static_cast<int64_t>(std::nearbyint(code * group_scale));
  return ((rounded + 128) % 256 + 256) % 256 - 128;
}

inline std::vector<uint16_t> reference_gemm(const ReferenceProblem& p) {
  std::vector<uint16_t> output(static_cast<size_t>(p.num_tokens * p.out_features));
  std::vector<int64_t> weight(static_cast<size_t>(p.in_features));
  for (int64_t n = 0; n < p.out_features; ++n) {
    for (int64_t k = 0; k < p.in_features; ++k) {
      const int code = p.codes[static_cast<size_t>(k * p.out_features + n)];
      weight[static_cast<size_t>(k)] =
          p.grouped
              ? reference_weight(code, float16_value(p.group_scale[static_cast<size_t>(k / 128 * p.out_features + n)]))
              : 16 * code;
    }
    for (int64_t m = 0; m < p.num_tokens; ++m) {
      int64_t sum = 0;
      for (int64_t k = 0; k < p.in_features; ++k) {
        sum += p.activations[static_cast<size_t>(m * p.in_features + k)] * weight[static_cast<size_t>(k)];
      }
      // volatile: one rounding to fp32 each, whatever the compiler's options. float(int64) rounds once, like
      // float(int32).
      volatile float value = static_cast<float>(sum);
      value = value * p.channel_scale[static_cast<size_t>(n)];
      value = value * p.token_scale[static_cast<size_t>(m)];
      if (!p.bias.empty()) {
        const uint16_t bits = p.bias[static_cast<size_t>(n)];
        value = value + static_cast<float>(p.bfloat16 ? bfloat16_value(bits) : float16_value(bits));
      }
      output[static_cast<size_t>(m * p.out_features + n)] = p.bfloat16 ? to_bfloat16(value) : to_float16(value);
    }
  }
  return output;
}

// Packed tensors, straight from the formulas of the format's document (section "Packed weights")

inline std::vector<int32_t> reference_pack(const std::vector<int8_t>& codes, int64_t in_features, int64_t out_features,
                                           bool grouped) {
  std::vector<uint32_t> words(static_cast<size_t>(in_features / 16 * 2 * out_features), 0);
  for (int64_t k = 0; k < in_features; ++k) {
    for (int64_t n = 0; n < out_features; ++n) {
      const int64_t word = 128 * (n / 64) + 16 * (n % 8) + 4 * ((k % 16) / 4) + (n % 64) / 16;
      const int64_t b = (n % 16) / 8;
      const int64_t r = k % 4;
      const int64_t p = grouped ? 2 * b + r / 2 + 4 * (r % 2) : 2 * r + (1 - b);
      const int code = codes[static_cast<size_t>(k * out_features + n)];
      const auto nibble = static_cast<uint32_t>(grouped ? code + 8 : code) & 15;
      words[static_cast<size_t>(k / 16 * 2 * out_features + word)] |= nibble << (4 * p);
    }
  }
  return {words.begin(), words.end()};
}

template <typename T>
std::vector<T> reference_permute(const std::vector<T>& natural, int64_t out_features, bool group) {
  std::vector<T> stored(natural.size());
  for (size_t i = 0; i < natural.size(); ++i) {
    const int64_t n = static_cast<int64_t>(i) % out_features;
    const int64_t j = n % 32;
    const int64_t column =
        group ? 64 * (n / 64) + 8 * (n % 8) + (n % 64) / 8 : 32 * (n / 32) + 8 * ((j % 8) / 2) + 2 * (j / 8) + j % 2;
    stored[i - static_cast<size_t>(n) + static_cast<size_t>(column)] = natural[i];
  }
  return stored;
}

}  // namespace marlin_qqq::testkit
