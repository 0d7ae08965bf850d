// The arithmetic of quantize_per_token on the GPU: for the kernel of that op, and for products that quantise their
// activations themselves. Definition: docs/format.md, "Activations".
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace marlin_qqq::cuda {

inline constexpr uint32_t kInfinityBits = 0x7f800000u;

// Elements of 16 bytes: their largest |x| in fp32 bits, which order like the numbers do, infinities and then NaNs above
// all; and their values.
template <class T>
struct ElementVector;

template <>
struct ElementVector<float> {
  static constexpr int kElements = 4;
  static __device__ __forceinline__ uint32_t largest(uint4 v) {
    return max(max(v.x & 0x7fffffffu, v.y & 0x7fffffffu), max(v.z & 0x7fffffffu, v.w & 0x7fffffffu));
  }
  static __device__ __forceinline__ void unpack(uint4 v, float (&x)[4]) {
    x[0] = __uint_as_float(v.x);
    x[1] = __uint_as_float(v.y);
    x[2] = __uint_as_float(v.z);
    x[3] = __uint_as_float(v.w);
  }
};

// The magnitudes of 16-bit floats order like unsigned integers, two lanes at a time.
__device__ __forceinline__ uint32_t largest_lanes(uint4 v) {
  constexpr uint32_t kMagnitude = 0x7fff7fffu;
  return __vmaxu2(__vmaxu2(v.x & kMagnitude, v.y & kMagnitude), __vmaxu2(v.z & kMagnitude, v.w & kMagnitude));
}

template <>
struct ElementVector<__half> {
  static constexpr int kElements = 8;
  static __device__ __forceinline__ uint32_t largest(uint4 v) {
    const uint32_t lanes = largest_lanes(v);
    const auto bits = static_cast<unsigned short>(max(lanes & 0xffffu, lanes >> 16));
    return __float_as_uint(__half2float(__ushort_as_half(bits))) & 0x7fffffffu;
  }
  static __device__ __forceinline__ void unpack(uint4 v, float (&x)[8]) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&words[i]));
      x[2 * i] = pair.x;
      x[2 * i + 1] = pair.y;
    }
  }
};

template <>
struct ElementVector<__nv_bfloat16> {
  static constexpr int kElements = 8;
  static __device__ __forceinline__ uint32_t largest(uint4 v) {
    const uint32_t lanes = largest_lanes(v);
    return max(lanes & 0xffffu, lanes >> 16) << 16;
  }
  static __device__ __forceinline__ void unpack(uint4 v, float (&x)[8]) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[2 * i] = __uint_as_float(words[i] << 16);
      x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  }
};

// What a row's largest |x| says: what its elements are multiplied with, at once, and its scale, when asked for. Zero
// and NaN for a row with a NaN or an infinity, zero and zero for a row of nothing but zeros, or next to it.
struct RowScale {
  uint32_t largest;  // bits
  float inverse;

  __device__ __forceinline__ explicit RowScale(uint32_t largest_bits) : largest(largest_bits) {
    inverse = __fdiv_rn(127.0f, __uint_as_float(largest));
    if (!is_finite() || __float_as_uint(inverse) >= kInfinityBits) inverse = 0.0f;
  }
  // Otherwise the row's int8 values are zero, which NaN * 0 would not be.
  __device__ __forceinline__ bool is_finite() const { return largest < kInfinityBits; }

  __device__ __forceinline__ float scale() const {
    if (!is_finite()) return __uint_as_float(0x7fc00000u);
    return inverse == 0.0f ? 0.0f : __fdiv_rn(__uint_as_float(largest), 127.0f);
  }
};

// x * inverse rounded half to even, in the low byte: |x * inverse| <= 127, and adding 1.5 * 2^23 to a product that has
// been rounded to fp32 rounds it to an integer in the low bits.
__device__ __forceinline__ uint32_t quantized_bits(float x, float inverse) {
  return __float_as_uint(__fadd_rn(__fmul_rn(x, inverse), 12582912.0f));
}

__device__ __forceinline__ uint32_t pack4(const float* x, float inverse) {
  const uint32_t low = __byte_perm(quantized_bits(x[0], inverse), quantized_bits(x[1], inverse), 0x0040);
  const uint32_t high = __byte_perm(quantized_bits(x[2], inverse), quantized_bits(x[3], inverse), 0x0040);
  return __byte_perm(low, high, 0x5410);
}

// A vector of eight elements as int8.
template <class T>
__device__ __forceinline__ uint2 quantized_vector(uint4 vector, RowScale scale) {
  static_assert(ElementVector<T>::kElements == 8);
  if (!scale.is_finite()) return make_uint2(0, 0);
  float elements[8];
  ElementVector<T>::unpack(vector, elements);
  return {pack4(elements, scale.inverse), pack4(elements + 4, scale.inverse)};
}

}  // namespace marlin_qqq::cuda
