// The CUDA side of the run-time ops: checks, device, stream, allocation, plan, launch. Built into the second
// library, which is loaded only where torch has CUDA. Nothing here waits for the GPU, so CUDA graphs may capture it.
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <array>
#include <cstdlib>
#include <functional>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/gemm.h"
#include "cuda/quantize/quantize.h"
#include "cuda/stream_order.h"
#include "plan/plan.h"
#include "torch/arguments.h"

namespace marlin_qqq::torch_ops {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::accelerator::DeviceGuard;

constexpr int kAlignment = 16;  // bytes; cp.async and TMA move 16 at a time

void check_cuda(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // a refused launch must not be reported again by the next call
  fail(op, "CUDA error ", cudaGetErrorName(error), ": ", cudaGetErrorString(error));
}

// The function lives in libtorch_cuda, which a library that also loads beside a CPU-only torch must not link. torch has
// loaded it long before the first CUDA tensor gets here.
cudaStream_t current_stream(int32_t device_index) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const Function function = [] {
    constexpr const char* name = "aoti_torch_get_current_cuda_stream";
    void* symbol = dlsym(RTLD_DEFAULT, name);
    if (symbol == nullptr) {
      if (void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD)) symbol = dlsym(library, name);
    }
    if (symbol == nullptr) fail("marlin_qqq", "this torch has CUDA tensors but no ", name, " in libtorch_cuda.so");
    return reinterpret_cast<Function>(symbol);
  }();
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(function(device_index, &stream));
  return static_cast<cudaStream_t>(stream);
}

bool is_set(const char* value) { return value != nullptr && *value != '\0'; }

long integer(const char* name, const char* value, long minimum, long maximum) {
  char* end = nullptr;
  const long number = std::strtol(value, &end, 10);
  if (*end != '\0' || number < minimum || number > maximum) {
    fail("marlin_qqq_gemm", name, " must be an integer from ", minimum, " to ", maximum, ", got ", value);
  }
  return number;
}

// Environment overrides, for tuning and for tests; read on every call, so that a running process can change them.
//   MARLIN_QQQ_FAMILY     "sm80" or "sm90": the kernel family
//   MARLIN_QQQ_TILE       name of a row of tile_table(), or of a candidate (deep256/1x3/2: split x scratch split,
//                         multicast); "list" fails with the device and all candidates of the problem
//   MARLIN_QQQ_SPLIT      blocks that share an output tile
//   MARLIN_QQQ_CANDIDATE  from 0: one of the planner's candidates for the problem, best first, instead of the others
struct PlanOverrides {
  const char* family = std::getenv("MARLIN_QQQ_FAMILY");
  const char* tile = std::getenv("MARLIN_QQQ_TILE");
  const char* split = std::getenv("MARLIN_QQQ_SPLIT");
  const char* candidate = std::getenv("MARLIN_QQQ_CANDIDATE");

  // What they say, in one string; empty where they say nothing.
  std::string text() const {
    if (!is_set(family) && !is_set(tile) && !is_set(split) && !is_set(candidate)) return {};
    std::string text;
    for (const char* value : {family, tile, split, candidate}) text.append(is_set(value) ? value : "").append("\n");
    return text;
  }

  plan::Plan make(const plan::Problem& problem, const plan::DeviceProperties& device) const {
    plan::Family family_override = plan::Family::kNone;
    if (is_set(family)) {
      if (std::string(family) == plan::family_name(plan::Family::kSm80)) {
        family_override = plan::Family::kSm80;
      } else if (std::string(family) == plan::family_name(plan::Family::kSm90)) {
        family_override = plan::Family::kSm90;
      } else {
        fail("marlin_qqq_gemm", "MARLIN_QQQ_FAMILY must be sm80 or sm90, got ", family);
      }
    }
    if (is_set(candidate)) {
      const std::vector<plan::Plan> plans = plan::candidates(problem, device, family_override);
      return plans[integer("MARLIN_QQQ_CANDIDATE", candidate, 0, static_cast<long>(plans.size()) - 1)];
    }
    const int split_override = is_set(split) ? static_cast<int>(integer("MARLIN_QQQ_SPLIT", split, 1, 65535)) : 0;
    return plan::make_plan(problem, device, is_set(tile) ? tile : "", split_override, family_override,
                           {"MARLIN_QQQ_TILE", "MARLIN_QQQ_SPLIT"});
  }
};

// What the stream says (cuda/stream_order.h), unless MARLIN_QQQ_STANDALONE is set: 1, every launch stands alone; 0,
// none.
bool stands_alone(const cuda::StreamOrder& order) {
  const char* standalone = std::getenv("MARLIN_QQQ_STANDALONE");
  if (is_set(standalone)) return integer("MARLIN_QQQ_STANDALONE", standalone, 0, 1) == 1;
  return order.stands_alone();
}

// Plans of recent problems, one small direct-mapped table a thread: planning costs more than the launch itself, and a
// model repeats a handful of problems. A colliding problem replaces the one before it.
class PlanCache {
 public:
  const plan::Plan& get(const plan::Problem& problem, int32_t device_index) {
    const PlanOverrides overrides;
    const std::string overrides_text = overrides.text();
    const uint64_t hash = mix(static_cast<uint64_t>(problem.num_tokens) * 0x9E3779B97F4A7C15u +
                              static_cast<uint64_t>(problem.out_features) * 0xC2B2AE3D27D4EB4Fu +
                              static_cast<uint64_t>(problem.in_features) * 0x165667B19E3779F9u +
                              static_cast<uint64_t>(8 * (problem.group_size + 2) + 4 * problem.standalone +
                                                    2 * problem.quantizes + problem.constant_weights) *
                                  0x27D4EB2F165667C5u +
                              static_cast<uint64_t>(device_index) + std::hash<std::string>()(overrides_text));
    Entry& entry = entries_[hash % entries_.size()];
    if (entry.device_index != device_index || entry.problem != problem || entry.overrides != overrides_text) {
      entry.device_index = -1;  // should planning throw
      plan::DeviceProperties device;
      check_cuda("marlin_qqq_gemm", cuda::current_device_properties(&device));
      entry.plan = overrides.make(problem, device);
      entry.problem = problem;
      entry.overrides = overrides_text;
      entry.device_index = device_index;
    }
    return entry.plan;
  }

 private:
  struct Entry {
    int32_t device_index = -1;
    plan::Problem problem{};
    std::string overrides;
    plan::Plan plan;
  };

  static uint64_t mix(uint64_t value) { return value ^ (value >> 29); }

  std::array<Entry, 512> entries_;
};

// Plans and launches a product that has passed the checks.
class Product {
 public:
  Product(const char* op, const GemmCall& call, bool quantizes, bool constant_weights, const cuda::StreamOrder& order)
      : op_(op), call_(call), order_(order), problem_{call.num_tokens,    call.out_features, call.in_features,
                                                      call.group_size,    quantizes,         constant_weights,
                                                      stands_alone(order)} {
    static thread_local PlanCache cache;
    plan_ = &cache.get(problem_, call.device_index);
  }

  Product(const Product&) = delete;

  // Whether the kernel takes rows in place of int8 activations and their scales.
  bool takes_rows() const { return plan_->quantizes; }

  // What was planned with: the launch of the activations' quantisation is a part of this one's.
  bool standalone() const { return problem_.standalone; }

  void launch(const cuda::Rows& rows, const Tensor& output) const {
    // Freed on return, reused by torch only for work that is later on the same stream.
    std::optional<Tensor> scratch;
    if (plan_->scratch_bytes > 0) {
      scratch = empty(op_, {plan_->scratch_bytes}, dtype_codes().int8, call_.device_type, call_.device_index);
    }
    const cuda::GemmArguments arguments{
        call_.activations,
        call_.packed_weight,
        call_.token_scale,
        call_.channel_scale,
        call_.group_scale,
        call_.bias,
        output.mutable_data_ptr(),
        call_.output_is_bfloat16 ? cuda::OutputType::kBFloat16 : cuda::OutputType::kFloat16,
        rows,
    };
    check_cuda(op_, cuda::launch_gemm(*plan_, problem_, arguments, scratch ? scratch->mutable_data_ptr() : nullptr,
                                      order_.stream()));
    if (plan_->family != plan::Family::kNone) order_.remember_launch(/*next_stands_alone=*/false);
  }

 private:
  const char* op_;
  const GemmCall& call_;
  const cuda::StreamOrder& order_;
  plan::Problem problem_;
  const plan::Plan* plan_;
};

Tensor marlin_qqq_gemm_cuda(const Tensor& a, const Tensor& b_q_weight, const Tensor& s_tok, const Tensor& s_ch,
                            const Tensor& s_group, const Tensor& workspace, int64_t size_m, int64_t size_n,
                            int64_t size_k, const std::optional<Tensor>& bias,
                            const std::optional<ScalarType>& out_dtype, bool constant_weights) {
  const GemmCall call =
      check_gemm(a, b_q_weight, s_tok, s_ch, s_group, workspace, size_m, size_n, size_k, bias, out_dtype, kAlignment);
  const DeviceGuard guard(call.device_index);
  const Tensor output = call.empty_output();
  if (call.num_tokens == 0) return output;
  const cuda::StreamOrder order(current_stream(call.device_index));
  Product("marlin_qqq_gemm", call, /*quantizes=*/false, constant_weights, order).launch({}, output);
  return output;
}

void quantize(const char* op, const QuantizeCall& call, bool standalone, const cuda::StreamOrder& order) {
  const TokenRows& rows = call.rows;
  if (rows.num_tokens == 0) return;
  const DtypeCodes& dtypes = dtype_codes();
  const cuda::InputType input_type = rows.dtype == dtypes.float16    ? cuda::InputType::kFloat16
                                     : rows.dtype == dtypes.bfloat16 ? cuda::InputType::kBFloat16
                                                                     : cuda::InputType::kFloat32;
  check_cuda(op,
             cuda::launch_quantize_per_token(rows.x.const_data_ptr(), input_type, rows.num_tokens, rows.in_features,
                                             rows.row_stride, static_cast<int8_t*>(call.quantized.mutable_data_ptr()),
                                             static_cast<float*>(call.token_scale.mutable_data_ptr()), order.stream()));
  order.remember_launch(standalone);
}

std::tuple<Tensor, Tensor> quantize_per_token_cuda(const Tensor& x) {
  const DeviceGuard guard(x.get_device_index());
  const QuantizeCall call = check_quantize_per_token(x);
  const cuda::StreamOrder order(current_stream(x.get_device_index()));
  quantize("quantize_per_token", call, stands_alone(order), order);
  return {call.quantized, call.token_scale};
}

Tensor marlin_qqq_linear_cuda(const Tensor& x, const Tensor& b_q_weight, const Tensor& s_ch, const Tensor& s_group,
                              const std::optional<Tensor>& bias, const std::optional<ScalarType>& out_dtype,
                              bool constant_weights) {
  constexpr const char* op = "marlin_qqq_linear";
  LinearCall call = check_linear(x, b_q_weight, s_ch, s_group, bias, out_dtype, kAlignment);
  const DeviceGuard guard(call.gemm.device_index);
  GemmCall& gemm = call.gemm;
  const Tensor output = call.empty_output();
  if (gemm.num_tokens == 0) return output;
  const cuda::StreamOrder order(current_stream(gemm.device_index));

  const cuda::Rows rows{call.rows.x.const_data_ptr(), call.rows.row_stride, call.rows.dtype == dtype_codes().bfloat16};
  const bool kernel_reads_rows = call.rows.dtype != dtype_codes().float32 &&
                                 reinterpret_cast<uintptr_t>(rows.x) % kAlignment == 0 && rows.stride % 8 == 0;
  const Product product(op, gemm, kernel_reads_rows, constant_weights, order);
  if (product.takes_rows()) {
    product.launch(rows, output);
    return output;
  }
  const QuantizeCall activations(call.rows);
  quantize(op, activations, product.standalone(), order);
  gemm.set_activations(activations);
  product.launch({}, output);
  return output;
}

}  // namespace
}  // namespace marlin_qqq::torch_ops

STABLE_TORCH_LIBRARY_IMPL(marlin_qqq, CUDA, library) {
  namespace ops = marlin_qqq::torch_ops;
  library.impl("marlin_qqq_gemm", TORCH_BOX(&ops::marlin_qqq_gemm_cuda));
  library.impl("quantize_per_token", TORCH_BOX(&ops::quantize_per_token_cuda));
  library.impl("marlin_qqq_linear", TORCH_BOX(&ops::marlin_qqq_linear_cuda));
}
