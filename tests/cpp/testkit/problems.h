// Random problems and running them through csrc/cpu.
#pragma once

#include <algorithm>
#include <random>
#include <vector>

#include "cpu/kernels.h"
#include "testkit/reference.h"

namespace marlin_qqq::testkit {

// Activations use all of int8, -128 too. Group scales are such that |code * scale| <= 127 unless `wrapping`: then up to
// 512.
inline ReferenceProblem random_problem(int64_t num_tokens, int64_t out_features, int64_t in_features, bool grouped,
                                       uint32_t seed, bool bfloat16 = false, bool bias = false, bool wrapping = false) {
  std::mt19937 random(seed);
  std::uniform_int_distribution<int> byte(-128, 127);
  std::uniform_int_distribution<int> code(-8, 7);
  std::uniform_real_distribution<float> unit(0.0F, 1.0F);
  ReferenceProblem p;
  p.num_tokens = num_tokens;
  p.out_features = out_features;
  p.in_features = in_features;
  p.grouped = grouped;
  p.bfloat16 = bfloat16;
  p.activations.resize(static_cast<size_t>(num_tokens * in_features));
  p.codes.resize(static_cast<size_t>(in_features * out_features));
  p.token_scale.resize(static_cast<size_t>(num_tokens));
  p.channel_scale.resize(static_cast<size_t>(out_features));
  for (int8_t& a : p.activations) a = static_cast<int8_t>(byte(random));
  for (int8_t& q : p.codes) q = static_cast<int8_t>(code(random));
  for (float& s : p.token_scale) s = 0.01F * unit(random);
  for (float& s : p.channel_scale) s = 0.02F * unit(random) - 0.01F;
  if (grouped) {
    p.group_scale.resize(static_cast<size_t>(in_features / 128 * out_features));
    const double largest = (wrapping ? 512.0 : 127.0) / 8;
    for (uint16_t& s : p.group_scale) s = to_float16(largest * (2.0 * unit(random) - 1.0));
    // Corners of fp16
    p.group_scale[0] = 0x0001;                         // smallest subnormal
    p.group_scale[p.group_scale.size() / 2] = 0x8000;  // -0
    p.group_scale.back() = to_float16(-0.5);           // ties
  }
  if (bias) {
    p.bias.resize(static_cast<size_t>(out_features));
    for (uint16_t& b : p.bias) b = bfloat16 ? to_bfloat16(unit(random) - 0.5) : to_float16(unit(random) - 0.5);
  }
  return p;
}

// The problem in stored form.
struct StoredProblem {
  explicit StoredProblem(const ReferenceProblem& problem)
      : p(problem),
        packed(reference_pack(p.codes, p.in_features, p.out_features, p.grouped)),
        channel_scale(reference_permute(p.channel_scale, p.out_features, false)),
        group_scale(reference_permute(p.group_scale, p.out_features, true)) {}

  std::vector<uint16_t> gemm(int num_threads) const {
    constexpr size_t kGuard = 64;
    constexpr uint16_t kCanary = 0xBEEF;
    std::vector<uint16_t> output(static_cast<size_t>(p.num_tokens * p.out_features) + 2 * kGuard, kCanary);
    cpu::gemm(p.activations.data(), packed.data(), p.token_scale.data(), channel_scale.data(),
              p.grouped ? group_scale.data() : nullptr, p.bias.empty() ? nullptr : p.bias.data(),
              output.data() + kGuard, p.bfloat16 ? cpu::OutputType::kBFloat16 : cpu::OutputType::kFloat16, p.num_tokens,
              p.out_features, p.in_features, num_threads);
    const auto is_canary = [](uint16_t value) { return value == kCanary; };
    if (!std::all_of(output.begin(), output.begin() + kGuard, is_canary) ||
        !std::all_of(output.end() - kGuard, output.end(), is_canary)) {
      return {};  // wrote outside the output: no test expects an empty result
    }
    return {output.begin() + kGuard, output.end() - kGuard};
  }

  const ReferenceProblem& p;
  std::vector<int32_t> packed;
  std::vector<float> channel_scale;
  std::vector<uint16_t> group_scale;
};

}  // namespace marlin_qqq::testkit
