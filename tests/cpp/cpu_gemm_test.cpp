// marlin_qqq_gemm on the CPU, every instruction set, against int64 arithmetic: equal to the bit.
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <thread>
#include <vector>

#include "cpu/kernels.h"
#include "testkit/instruction_sets.h"
#include "testkit/problems.h"
#include "testkit/reference.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace marlin_qqq {
namespace {

using testkit::random_problem;
using testkit::reference_gemm;
using testkit::ReferenceProblem;
using testkit::StoredProblem;

class CpuGemm : public testkit::WithInstructionSet {};
INSTANTIATE_TEST_SUITE_P(Every, CpuGemm, testing::ValuesIn(testkit::supported_instruction_sets()),
                         testkit::instruction_set_of);

void expect_exact(const ReferenceProblem& problem, int num_threads = 2) {
  const std::vector<uint16_t> output = StoredProblem(problem).gemm(num_threads);
  const std::vector<uint16_t> expected = reference_gemm(problem);
  ASSERT_EQ(output.size(), expected.size());
  for (size_t i = 0; i < output.size(); ++i) {
    const bool both_nan = problem.bfloat16
                              ? testkit::is_bfloat16_nan(output[i]) && testkit::is_bfloat16_nan(expected[i])
                              : testkit::is_float16_nan(output[i]) && testkit::is_float16_nan(expected[i]);
    ASSERT_TRUE(output[i] == expected[i] || both_nan)
        << "token " << i / static_cast<size_t>(problem.out_features) << ", out_feature "
        << i % static_cast<size_t>(problem.out_features) << ": " << output[i] << ", expected " << expected[i];
  }
}

TEST_P(CpuGemm, GridOfSizesAndForms) {
  uint32_t seed = 0;
  for (const int64_t num_tokens : {1, 2, 3, 4, 5, 6, 7, 13, 16, 33}) {
    for (const int64_t out_features : {64, 192}) {
      for (const int64_t in_features : {128, 640}) {
        for (const bool grouped : {false, true}) {
          const bool bfloat16 = seed % 2 == 1;
          const bool bias = seed / 2 % 2 == 1;
          SCOPED_TRACE(testing::Message() << num_tokens << " x " << out_features << " x " << in_features
                                          << (grouped ? " group" : " channel"));
          expect_exact(random_problem(num_tokens, out_features, in_features, grouped, ++seed, bfloat16, bias));
        }
      }
    }
  }
}

// More tokens than one task takes, more columns than one task takes, several slices of in_features.
TEST_P(CpuGemm, SeveralTasksEachWay) {
  expect_exact(random_problem(1100, 128, 256, true, 7));
  expect_exact(random_problem(5, 64 * 37, 1408, false, 8, true, true));
}

TEST_P(CpuGemm, ProductsOutsideInt8WrapModulo256) {
  expect_exact(random_problem(9, 128, 256, true, 3, false, false, true));
}

// The extremes of every factor, where 16-bit or saturating arithmetic would show.
TEST_P(CpuGemm, ExtremeActivationsAndWeights) {
  for (const int activation : {-128, 127}) {
    for (const int code : {-8, 7}) {
      for (const bool grouped : {false, true}) {
        for (const int64_t num_tokens : {1, 7}) {
          ReferenceProblem problem = random_problem(num_tokens, 64, 2048, grouped, 5);
          std::fill(problem.activations.begin(), problem.activations.end(), static_cast<int8_t>(activation));
          std::fill(problem.codes.begin(), problem.codes.end(), static_cast<int8_t>(code));
          std::fill(problem.group_scale.begin(), problem.group_scale.end(), testkit::to_float16(16));
          SCOPED_TRACE(testing::Message() << "a " << activation << ", q " << code << ", grouped " << grouped);
          expect_exact(problem);
        }
      }
    }
  }
}

// The largest sum that the format allows: 127 * 128 * in_features just below 2^31.
TEST_P(CpuGemm, LargestInFeatures) {
  for (const int64_t num_tokens : {1, 4}) {
    ReferenceProblem problem = random_problem(num_tokens, 64, 132096, false, 6);
    std::fill(problem.activations.begin(), problem.activations.end(), int8_t{127});
    std::fill(problem.codes.begin(), problem.codes.end(), int8_t{-8});
    std::fill(problem.token_scale.begin(), problem.token_scale.end(), 1e-5F);
    expect_exact(problem);
  }
}

TEST_P(CpuGemm, SpecialScales) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  for (const bool bfloat16 : {false, true}) {
    ReferenceProblem problem = random_problem(8, 64, 128, false, 4, bfloat16);
    // fp16 overflow, subnormal outputs, subnormal scales, zeros, NaN rows (a token that held a NaN)
    problem.token_scale = {1e4F, 1e-9F, 1e-40F, 0.0F, kNan, kInfinity, -1.0F, 3e38F};
    problem.channel_scale[0] = 1e-41F;
    problem.channel_scale[1] = 0.0F;
    problem.channel_scale[2] = 3e38F;
    problem.channel_scale[3] = -kInfinity;
    expect_exact(problem);
  }
}

TEST_P(CpuGemm, ScalesThatAreNotFiniteGiveZeroWeights) {
  ReferenceProblem problem = random_problem(4, 64, 128, true, 9);
  const uint16_t odd[] = {0x7C00, 0xFC00, 0x7E00};
  for (size_t n = 0; n < 3; ++n) {
    problem.group_scale[n] = odd[n];
  }
  const std::vector<uint16_t> output = StoredProblem(problem).gemm(1);
  for (size_t n = 0; n < 3; ++n) {
    EXPECT_EQ(output[n] & 0x7FFF, 0) << "out_feature " << n;
  }
}

TEST_P(CpuGemm, EmptyProblems) {
  EXPECT_EQ(StoredProblem(random_problem(0, 64, 128, false, 1)).gemm(2).size(), 0u);
  // No inputs: the bias alone
  const ReferenceProblem no_inputs = random_problem(3, 64, 0, false, 1, false, true);
  expect_exact(no_inputs);
}

TEST_P(CpuGemm, SameBitsForAnyNumberOfThreads) {
  for (const int64_t num_tokens : {1, 3, 37, 600}) {
    for (const bool grouped : {false, true}) {
      const ReferenceProblem problem = random_problem(num_tokens, 64 * 23, 1024, grouped, 11);
      const StoredProblem stored(problem);
      const std::vector<uint16_t> alone = stored.gemm(1);
      for (const int num_threads : {0, 2, 3, 16}) {
        ASSERT_EQ(stored.gemm(num_threads), alone) << num_threads << " threads, " << num_tokens << " tokens";
      }
    }
  }
}

// A row's bits do not depend on the batch that it is in.
TEST_P(CpuGemm, RowsDoNotDependOnTheirBatch) {
  const ReferenceProblem batch = random_problem(19, 128, 1152, true, 12);
  const std::vector<uint16_t> together = StoredProblem(batch).gemm(2);
  for (int64_t m = 0; m < batch.num_tokens; ++m) {
    ReferenceProblem row = batch;
    row.num_tokens = 1;
    row.activations.assign(batch.activations.begin() + m * batch.in_features,
                           batch.activations.begin() + (m + 1) * batch.in_features);
    row.token_scale.assign(1, batch.token_scale[static_cast<size_t>(m)]);
    const std::vector<uint16_t> alone = StoredProblem(row).gemm(2);
    ASSERT_TRUE(std::equal(alone.begin(), alone.end(), together.begin() + m * batch.out_features)) << "row " << m;
  }
}

// Activations come from tensors that need no more alignment than a byte.
TEST_P(CpuGemm, UnalignedActivations) {
  ReferenceProblem problem = random_problem(6, 64, 256, false, 13);
  const std::vector<uint16_t> expected = reference_gemm(problem);
  const StoredProblem stored(problem);
  std::vector<int8_t> shifted(problem.activations.size() + 1);
  std::copy(problem.activations.begin(), problem.activations.end(), shifted.begin() + 1);
  std::vector<uint16_t> output(expected.size());
  cpu::gemm(shifted.data() + 1, stored.packed.data(), problem.token_scale.data(), stored.channel_scale.data(), nullptr,
            nullptr, output.data(), cpu::OutputType::kFloat16, problem.num_tokens, problem.out_features,
            problem.in_features, 1);
  EXPECT_EQ(output, expected);
}

TEST_P(CpuGemm, CallsFromSeveralThreadsAtOnce) {
  const ReferenceProblem problem = random_problem(12, 64 * 20, 1024, true, 14);
  const StoredProblem stored(problem);
  const std::vector<uint16_t> expected = stored.gemm(1);
  std::vector<int> wrong(4, 0);
  std::vector<std::thread> callers;
  for (size_t i = 0; i < wrong.size(); ++i) {
    callers.emplace_back([&, i] {
      for (int repeat = 0; repeat < 25; ++repeat) {
        wrong[i] += stored.gemm(3) != expected ? 1 : 0;
      }
    });
  }
  for (std::thread& caller : callers) {
    caller.join();
  }
  EXPECT_EQ(wrong, std::vector<int>(4, 0));
}

#if defined(__x86_64__)
// torch.set_flush_denormal(True) sets these bits in the calling thread only.
TEST_P(CpuGemm, CallersFloatingPointModeDoesNotMatter) {
  ReferenceProblem problem = random_problem(2, 64, 128, true, 15, true);
  std::fill(problem.token_scale.begin(), problem.token_scale.end(), 1e-40F);
  std::fill(problem.channel_scale.begin(), problem.channel_scale.end(), 0.5F);
  const StoredProblem stored(problem);
  const std::vector<uint16_t> expected = reference_gemm(problem);
  const unsigned int saved = _mm_getcsr();
  _mm_setcsr(saved | 0x8040 | 0x6000);  // flush to zero, denormals are zero, round towards zero
  const std::vector<uint16_t> output = stored.gemm(2);
  const unsigned int after = _mm_getcsr();
  _mm_setcsr(saved);
  EXPECT_EQ(output, expected);
  EXPECT_EQ(after & 0xFFC0u, (saved | 0x8040 | 0x6000) & 0xFFC0u) << "the caller's mode was not put back";
}
#endif

TEST(InstructionSets, GenericIsAlwaysThereAndNamesAreDistinct) {
  EXPECT_TRUE(cpu::is_supported(cpu::InstructionSet::kGeneric));
  EXPECT_TRUE(cpu::is_supported(cpu::instruction_set()));
  EXPECT_STREQ(cpu::instruction_set_name(cpu::InstructionSet::kGeneric), "generic");
  EXPECT_STREQ(cpu::instruction_set_name(cpu::InstructionSet::kAvx2), "avx2");
  EXPECT_STREQ(cpu::instruction_set_name(cpu::InstructionSet::kAvxVnni), "avx_vnni");
  EXPECT_STREQ(cpu::instruction_set_name(cpu::InstructionSet::kAvx512Vnni), "avx512_vnni");
  EXPECT_STREQ(cpu::instruction_set_name(cpu::InstructionSet::kNeonDotprod), "neon_dotprod");
}

}  // namespace
}  // namespace marlin_qqq
