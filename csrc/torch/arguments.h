// What the ops accept, checked once for every backend. A refused call launches nothing and changes nothing.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "torch/tensor_helpers.h"

namespace marlin_qqq::torch_ops {

// A product that has passed the checks: sizes, raw pointers, where it lives.
struct GemmCall {
  const char* op;
  int64_t num_tokens;
  int64_t out_features;
  int64_t in_features;
  int group_size;  // 128, or -1: per-channel
  const int8_t* activations;
  const int32_t* packed_weight;
  const float* token_scale;
  const float* channel_scale;
  const uint16_t* group_scale;  // nullptr: per-channel
  const void* bias;             // nullptr: none
  bool output_is_bfloat16;
  int32_t device_type;
  int32_t device_index;

  int32_t output_dtype() const;  // torch's code
  Tensor empty_output() const;

  // Activations and their scales, from a quantisation on the same stream; `call` keeps them alive.
  void set_activations(const struct QuantizeCall& call);
};

// The arguments of marlin_qqq_gemm. `alignment`: bytes that every pointer but s_tok's must be a multiple of (1: any).
GemmCall check_gemm(const Tensor& a, const Tensor& b_q_weight, const Tensor& s_tok, const Tensor& s_ch,
                    const Tensor& s_group, const Tensor& workspace, int64_t size_m, int64_t size_n, int64_t size_k,
                    const std::optional<Tensor>& bias, const std::optional<torch::headeronly::ScalarType>& out_dtype,
                    int alignment);

// Activations before their quantisation, as rows.
struct TokenRows {
  const char* op;
  Tensor x;  // keeps the rows alive: the argument itself, or a contiguous copy of it
  int64_t num_tokens;
  int64_t in_features;
  int64_t row_stride;  // elements
  int32_t dtype;       // float16, bfloat16 or float32
};

// A quantisation of rows that have passed the checks, with its outputs.
struct QuantizeCall {
  explicit QuantizeCall(const TokenRows& rows);

  TokenRows rows;
  Tensor quantized;    // int8, x's shape
  Tensor token_scale;  // fp32, x's shape with 1 as its last size
};

QuantizeCall check_quantize_per_token(const Tensor& x);

// A call of marlin_qqq_linear that has passed the checks.
struct LinearCall {
  TokenRows rows;
  GemmCall gemm;  // without activations and token_scale

  Tensor empty_output() const;  // x's shape with out_features as its last size
};

// `alignment`: bytes that the pointers of weights, scales and bias must be a multiple of.
LinearCall check_linear(const Tensor& x, const Tensor& b_q_weight, const Tensor& s_ch, const Tensor& s_group,
                        const std::optional<Tensor>& bias,
                        const std::optional<torch::headeronly::ScalarType>& out_dtype, int alignment);

}  // namespace marlin_qqq::torch_ops
