// marlin_qqq_gemm on the CPU: cuts the product into tasks and walks each one slice by slice. A slice of 64 columns is
// dequantised once and used for all tokens of the task while it lies in the nearest cache.
#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "cpu/gemm_backend.h"
#include "cpu/instruction_set.h"
#include "cpu/kernels.h"
#include "cpu/thread_pool.h"
#include "format/float16.h"
#include "format/limits.h"
#include "format/scale_permutation.h"

namespace marlin_qqq::cpu {
namespace {

// Tokens that share one dequantised slice. More would only grow the sums: the cost of dequantising is lost in 512.
constexpr int64_t kMostTokensPerTask = 512;
// With fewer, dequantising the same weights in several tasks would cost more than idle threads.
constexpr int64_t kFewestTokensPerTask = 64;
// in_features of a slice: 64 columns of it are 32 KiB as bytes.
constexpr int64_t kSlice = 512;
// A streamed slice is never stored, only the number of rows in flight counts.
constexpr int64_t kStreamedSlice = 512;
// Sums of a task stay within this, which fits every second-level cache.
constexpr int64_t kSumsBytes = 256 * 1024;
// Widest task: 512 columns are 4 KiB of a packed row, a page.
constexpr int64_t kMostBlocksPerTask = 8;

// Scratch that a thread keeps: a fresh 300 KiB from the system at every task would cost more in page faults than
// the task. 64-byte aligned.
class Scratch {
 public:
  char* get(size_t bytes) {
    if (bytes > size_) {
      data_.reset();
      size_ = 0;
      data_.reset(static_cast<char*>(::operator new(bytes, kAlignment)));
      size_ = bytes;
    }
    return data_.get();
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(char* data) const { ::operator delete(data, kAlignment); }
  };
  std::unique_ptr<char, Free> data_;
  size_t size_ = 0;
};

constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
constexpr int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

struct Gemm {
  const GemmBackend* backend;
  const int8_t* activations;
  const int32_t* packed_weight;
  const float* token_scale;
  const float* channel_scale;
  const uint16_t* group_scale;
  const uint16_t* bias;
  uint16_t* output;
  OutputType output_type;
  int64_t num_tokens;
  int64_t out_features;
  int64_t in_features;
  const int32_t* initial_sums;  // [num_tokens]

  int64_t tokens_per_task;
  int64_t blocks_per_task;
  int64_t column_tasks;

  // How to cut: enough tasks for every thread to have several, sums within kSumsBytes.
  int64_t plan_tasks(int num_threads) {
    const int64_t blocks = out_features / kBlockColumns;
    // Tokens are cut evenly, and finer than a task's most where columns alone would leave threads idle.
    const int64_t for_threads = std::min(ceil_div(2 * num_threads, blocks), num_tokens / kFewestTokensPerTask);
    tokens_per_task = ceil_div(num_tokens, std::max(ceil_div(num_tokens, kMostTokensPerTask), for_threads));
    const int64_t token_tasks = ceil_div(num_tokens, tokens_per_task);
    const int64_t within_cache = kSumsBytes / (tokens_per_task * kBlockColumns * int64_t{sizeof(int32_t)});
    const int64_t for_balance = blocks * token_tasks / (int64_t{4} * num_threads);
    blocks_per_task = std::clamp<int64_t>(std::min(within_cache, for_balance), 1, kMostBlocksPerTask);
    column_tasks = ceil_div(blocks, blocks_per_task);
    return column_tasks * token_tasks;
  }

  void operator()(int64_t task) const {
    const int64_t first_token = task / column_tasks * tokens_per_task;
    const int64_t first_block = task % column_tasks * blocks_per_task;
    const int64_t tokens = std::min(tokens_per_task, num_tokens - first_token);
    const int64_t blocks = std::min(blocks_per_task, out_features / kBlockColumns - first_block);
    const bool streamed = tokens <= backend->most_streamed_tokens;
    const int64_t slice = std::min(streamed ? kStreamedSlice : kSlice, in_features);

    // Scratch: sums, one dequantised slice of one block, prepared activations of one slice
    const int64_t sums_per_block = tokens * kBlockColumns;
    const int64_t sums_bytes = blocks * sums_per_block * int64_t{sizeof(int32_t)};
    const int64_t weight_bytes = streamed ? 0 : slice * kBlockColumns * backend->weight_bytes;
    const int64_t prepared_bytes = round_up(tokens * slice * backend->activation_bytes, 64);
    static thread_local Scratch scratch;
    char* memory = scratch.get(static_cast<size_t>(sums_bytes + weight_bytes + prepared_bytes));
    auto* sums = reinterpret_cast<int32_t*>(memory);
    char* weight = memory + sums_bytes;
    char* prepared = weight + weight_bytes;

    for (int64_t block = 0; block < blocks; ++block) {
      for (int64_t token = 0; token < tokens; ++token) {
        std::fill_n(sums + block * sums_per_block + token * kBlockColumns, kBlockColumns,
                    initial_sums[first_token + token]);
      }
    }

    for (int64_t k = 0; k < in_features; k += slice) {
      const int64_t depth = std::min(slice, in_features - k);
      ActivationSlice activation{activations + first_token * in_features + k, in_features, tokens};
      if (backend->activation_bytes != 0) {
        backend->prepare_activations(activation, depth, prepared);
        activation = {reinterpret_cast<const int8_t*>(prepared), depth * backend->activation_bytes, tokens};
      }
      for (int64_t block = 0; block < blocks; ++block) {
        const WeightSlice weight_slice = slice_of(first_block + block, k, depth);
        int32_t* block_sums = sums + block * sums_per_block;
        if (streamed) {
          backend->stream(activation, weight_slice, block_sums);
        } else {
          backend->dequantize(weight_slice, weight);
          backend->multiply(activation, weight, depth, block_sums);
        }
      }
    }

    for (int64_t block = 0; block < blocks; ++block) {
      finish(first_block + block, first_token, tokens, sums + block * sums_per_block);
    }
  }

  WeightSlice slice_of(int64_t block, int64_t k, int64_t depth) const {
    const int64_t words_per_row = 2 * out_features;
    const int32_t* packed = packed_weight + k / format::kTileInFeatures * words_per_row + block * format::kWordsPerTile;
    const uint16_t* scale =
        group_scale == nullptr ? nullptr : group_scale + k / format::kGroupSize * out_features + block * kBlockColumns;
    return {packed, words_per_row, scale, out_features, depth};
  }

  void finish(int64_t block, int64_t first_token, int64_t tokens, const int32_t* sums) const {
    const int64_t first_column = block * kBlockColumns;
    alignas(64) float block_scale[kBlockColumns];
    alignas(64) float block_bias[kBlockColumns];
    for (int64_t j = 0; j < kBlockColumns; ++j) {
      const int64_t n = first_column + j;
      block_scale[j] = channel_scale[format::stored_channel_scale_column(n)];
      block_bias[j] = bias == nullptr ? 0.0F : format::output_to_float(bias[n], output_type);
    }
    backend->epilogue({sums, token_scale + first_token, block_scale, bias == nullptr ? nullptr : block_bias,
                       output + first_token * out_features + first_column, out_features, tokens, output_type});
  }
};

// Threads worth waking: below some fifty microseconds of work each, waking them costs more than they save.
int useful_threads(int64_t num_tokens, int64_t out_features, int64_t in_features, int num_threads) {
  constexpr int64_t kWeightsPerThread = 2'000'000;  // that many are dequantised in 50 us
  constexpr int64_t kTokensLikeDequantising = 8;    // multiplying them costs as much as dequantising
  const int64_t weights = out_features * in_features;
  const int64_t work = weights + weights / kTokensLikeDequantising * num_tokens;
  return static_cast<int>(std::clamp<int64_t>(work / kWeightsPerThread, 1, std::max(num_threads, 1)));
}

const GemmBackend& backend_of(InstructionSet set) {
  switch (set) {
#if defined(__x86_64__)
    case InstructionSet::kAvx2:
      return avx2_backend();
    case InstructionSet::kAvxVnni:
      return avx_vnni_backend();
    case InstructionSet::kAvx512Vnni:
      return avx512_vnni_backend();
#elif defined(__aarch64__)
    case InstructionSet::kNeonDotprod:
      return neon_dotprod_backend();
#endif
    default:
      return generic_backend();
  }
}

}  // namespace

void gemm(const int8_t* activations, const int32_t* packed_weight, const float* token_scale, const float* channel_scale,
          const uint16_t* group_scale, const void* bias, void* output, OutputType output_type, int64_t num_tokens,
          int64_t out_features, int64_t in_features, int num_threads) {
  if (num_tokens == 0 || out_features == 0) {
    return;
  }
  const GemmBackend& backend = backend_of(instruction_set());
  num_threads = useful_threads(num_tokens, out_features, in_features, num_threads);

  constexpr int64_t kSumTokens = 64;  // tokens of a task of the first pass: too little work to share below that
  std::vector<int32_t> initial_sums(static_cast<size_t>(num_tokens));
  auto sum_tokens = [&](int64_t task) {
    const int64_t end = std::min(num_tokens, (task + 1) * kSumTokens);
    for (int64_t token = task * kSumTokens; token < end; ++token) {
      initial_sums[static_cast<size_t>(token)] = backend.initial_sum(activations + token * in_features, in_features);
    }
  };
  parallel_for(ceil_div(num_tokens, kSumTokens), num_threads, sum_tokens);

  Gemm product{&backend,
               activations,
               packed_weight,
               token_scale,
               channel_scale,
               group_scale,
               static_cast<const uint16_t*>(bias),
               static_cast<uint16_t*>(output),
               output_type,
               num_tokens,
               out_features,
               in_features,
               initial_sums.data(),
               0,
               0,
               0};
  const int64_t num_tasks = product.plan_tasks(num_threads);
  parallel_for(num_tasks, num_threads, product);
}

}  // namespace marlin_qqq::cpu
