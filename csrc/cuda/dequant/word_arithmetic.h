// The instructions that dequantisation is made of, on 32-bit registers. On the GPU each is one instruction; on the
// host each is emulated exactly, so that tests run the same dequantisation code over every input.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define MARLIN_QQQ_DEVICE_FUNCTION __host__ __device__ __forceinline__
#else
#define MARLIN_QQQ_DEVICE_FUNCTION inline
#endif

namespace marlin_qqq::dequant {

namespace emulated {

inline double half_to_double(uint16_t bits) {
  const int exponent = (bits >> 10) & 31;
  const int mantissa = bits & 1023;
  const double sign = bits & 0x8000 ? -1.0 : 1.0;
  if (exponent == 31) return mantissa ? std::nan("") : sign * INFINITY;
  return sign * (exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24));
}

// Round-half-even in one step: the caller's double holds the exact result of a half fma of our operands.
inline uint16_t double_to_half(double value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const double magnitude = std::fabs(value);
  if (std::isnan(value)) return 0x7fff;
  if (magnitude == 0.0) return sign;
  if (magnitude >= 65520.0) return sign | 0x7c00;
  int exponent = 0;
  std::frexp(magnitude, &exponent);                            // magnitude = f * 2^exponent, f in [0.5, 1)
  const int unit = exponent - 11 < -24 ? -24 : exponent - 11;  // exponent of the last mantissa bit
  const auto steps = static_cast<uint32_t>(std::nearbyint(std::ldexp(magnitude, -unit)));
  return sign | static_cast<uint16_t>(steps + ((unit + 24) << 10));  // a carry out of the mantissa bumps the exponent
}

inline uint32_t half2_fma(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result = 0;
  for (int i = 0; i < 32; i += 16) {
    const double product = half_to_double(a >> i & 0xffff) * half_to_double(b >> i & 0xffff);
    result |= static_cast<uint32_t>(double_to_half(product + half_to_double(c >> i & 0xffff))) << i;
  }
  return result;
}

}  // namespace emulated

// a * b + c on two fp16 lanes, each rounded once. PTX ISA fma.rn.f16x2.
MARLIN_QQQ_DEVICE_FUNCTION uint32_t half2_fma(uint32_t a, uint32_t b, uint32_t c) {
#if defined(__CUDA_ARCH__)
  uint32_t result;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  return result;
#else
  return emulated::half2_fma(a, b, c);
#endif
}

// a + b on two fp16 lanes. PTX ISA add.rn.f16x2.
MARLIN_QQQ_DEVICE_FUNCTION uint32_t half2_add(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint32_t result;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
#else
  return emulated::half2_fma(a, 0x3c003c00, b);
#endif
}

// a - b on two fp16 lanes. PTX ISA sub.rn.f16x2.
MARLIN_QQQ_DEVICE_FUNCTION uint32_t half2_subtract(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint32_t result;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
#else
  return emulated::half2_fma(b, 0xbc00bc00, a);
#endif
}

// a * b on two fp16 lanes. PTX ISA mul.rn.f16x2.
MARLIN_QQQ_DEVICE_FUNCTION uint32_t half2_multiply(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint32_t result;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
#else
  return emulated::half2_fma(a, b, 0x80008000);
#endif
}

// The low, or the high, half of a register in both. As moves, not as a byte permutation: fp16 arithmetic picks the
// halves of an operand itself, so this costs neither an instruction nor a register.
MARLIN_QQQ_DEVICE_FUNCTION uint32_t low_halves(uint32_t pair) {
#if defined(__CUDA_ARCH__)
  uint32_t result;
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %1;\nmov.b32 %0, {low, low};\n}" : "=r"(result) : "r"(pair));
  return result;
#else
  return (pair & 0xffff) | pair << 16;
#endif
}
MARLIN_QQQ_DEVICE_FUNCTION uint32_t high_halves(uint32_t pair) {
#if defined(__CUDA_ARCH__)
  uint32_t result;
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %1;\nmov.b32 %0, {high, high};\n}" : "=r"(result) : "r"(pair));
  return result;
#else
  return pair >> 16 | (pair & 0xffff0000u);
#endif
}

// (a & mask) | bits in one instruction. PTX ISA lop3, truth table (0xf0 & 0xcc) | 0xaa.
MARLIN_QQQ_DEVICE_FUNCTION uint32_t and_or(uint32_t a, uint32_t mask, uint32_t bits) {
#if defined(__CUDA_ARCH__)
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(a), "r"(mask), "r"(bits));
  return result;
#else
  return (a & mask) | bits;
#endif
}

// Four bytes picked from the eight of (a, b): nibble i of selector names byte i of the result (0-3: a, 4-7: b).
// PTX ISA prmt.
MARLIN_QQQ_DEVICE_FUNCTION uint32_t pick_bytes(uint32_t a, uint32_t b, uint32_t selector) {
#if defined(__CUDA_ARCH__)
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(selector));
  return result;
#else
  const uint64_t pool = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<uint32_t>(pool >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
  }
  return result;
#endif
}

}  // namespace marlin_qqq::dequant
