// Element types of the two ops' tensors.
#pragma once

namespace marlin_qqq::format {

// What marlin_qqq_gemm writes.
enum class OutputType { kFloat16, kBFloat16 };

// What quantize_per_token reads.
enum class InputType { kFloat16, kBFloat16, kFloat32 };

}  // namespace marlin_qqq::format
