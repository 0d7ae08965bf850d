// quantize_per_token: one pass, a row in registers. Definition: docs/format.md, "Activations".
#include "cuda/quantize/quantize.h"

#include <algorithm>

#include "cuda/common/dependent_launch.cuh"
#include "cuda/common/launch_dependent.h"
#include "cuda/common/prefetch.cuh"
#include "cuda/quantize/row_quantization.cuh"
#include "format/divide_up.h"

namespace marlin_qqq::cuda {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kMostVectors = 8;  // of 16 bytes, that a thread holds of a row

// The maximum over the threads of a row: blockDim.x threads, whole warps; threadIdx.y counts rows of the block.
__device__ __forceinline__ uint32_t row_maximum(uint32_t value) {
  value = __reduce_max_sync(~0u, value);
  const int warps = blockDim.x / 32;
  if (warps == 1) return value;
  __shared__ uint32_t partial[kMaxThreads / 32];
  uint32_t* row = partial + threadIdx.y * warps;
  if (threadIdx.x % 32 == 0) row[threadIdx.x / 32] = value;
  __syncthreads();
  const int lane = threadIdx.x % 32;
  return __reduce_max_sync(~0u, lane < warps ? row[lane] : 0u);
}

// A row's elements in 16-byte vectors, kVectors a thread. Rows are 16-byte aligned and in_features a multiple of a
// vector.
template <class T, int kVectors>
__global__ void __launch_bounds__(kMaxThreads)
    quantize_rows(const T* x, int64_t num_tokens, int64_t in_features, int64_t row_stride, int8_t* quantized,
                  float* token_scale) {
  constexpr int kElements = ElementVector<T>::kElements;
  allow_next_kernel();
  const int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool inside = token < num_tokens;
  const int vectors = static_cast<int>(in_features / kElements);
  const uint4* row = reinterpret_cast<const uint4*>(x + (inside ? token : 0) * row_stride);
  // Rows that are not in L2 are on their way there before the kernel before has ended: up to a fifth of the time at 16
  // to 256 tokens. Many long rows keep the memory bus busy as it is, and took between 8 % less and 10 % more.
  if (kVectors < kMostVectors || num_tokens <= 192) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int index = threadIdx.x + i * blockDim.x;
      if (index < vectors) prefetch_to_l2(row + index);
    }
  }
  wait_for_previous_kernel();

  uint4 values[kVectors];
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int index = threadIdx.x + i * blockDim.x;
    values[i] = index < vectors ? __ldcs(row + index) : make_uint4(0, 0, 0, 0);
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) largest = max(largest, ElementVector<T>::largest(values[i]));
  const RowScale scale(row_maximum(largest));
  if (!inside) return;
  if (threadIdx.x == 0) token_scale[token] = scale.scale();

  int8_t* target = quantized + token * in_features;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int index = threadIdx.x + i * blockDim.x;
    if (index >= vectors) break;
    if constexpr (kElements == 8) {
      reinterpret_cast<uint2*>(target)[index] = quantized_vector<T>(values[i], scale);
    } else {
      float elements[kElements];
      ElementVector<T>::unpack(values[i], elements);
      reinterpret_cast<uint32_t*>(target)[index] = scale.is_finite() ? pack4(elements, scale.inverse) : 0u;
    }
  }
}

// Any width and alignment: element by element, reading the row twice.
template <class T>
__global__ void __launch_bounds__(256) quantize_rows_of_any_shape(const T* x, int64_t in_features, int64_t row_stride,
                                                                  int8_t* quantized, float* token_scale) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const int64_t token = blockIdx.x;
  const T* row = x + token * row_stride;
  uint32_t largest = 0;
  for (int64_t i = threadIdx.x; i < in_features; i += blockDim.x) {
    largest = max(largest, __float_as_uint(static_cast<float>(row[i])) & 0x7fffffffu);
  }
  const RowScale scale(row_maximum(largest));
  if (threadIdx.x == 0) token_scale[token] = scale.scale();
  for (int64_t i = threadIdx.x; i < in_features; i += blockDim.x) {
    quantized[token * in_features + i] =
        scale.is_finite() ? static_cast<int8_t>(quantized_bits(static_cast<float>(row[i]), scale.inverse)) : int8_t{0};
  }
}

template <class T>
cudaError_t launch(const T* x, int64_t num_tokens, int64_t in_features, int64_t row_stride, int8_t* quantized,
                   float* token_scale, cudaStream_t stream) {
  constexpr int kElements = ElementVector<T>::kElements;
  const int64_t vectors = in_features / kElements;
  const bool aligned = reinterpret_cast<uintptr_t>(x) % 16 == 0 && row_stride % kElements == 0 &&
                       in_features % kElements == 0 && reinterpret_cast<uintptr_t>(quantized) % 8 == 0;
  if (!aligned || vectors == 0 || vectors > kMostVectors * kMaxThreads) {
    return launch_dependent(quantize_rows_of_any_shape<T>, dim3(static_cast<unsigned>(num_tokens)), dim3(256), 0, 1,
                            stream, x, in_features, row_stride, quantized, token_scale);
  }
  // At least two loads in flight a thread; and no more than 512 threads where eight will do, but for many tokens, where
  // no product waits for multiprocessors beside them. Measured on an H100, at every size from 1 x 2048 to 16384 x 8192,
  // against 1, 2, 4 and 8 vectors, alone and between products.
  const int64_t most_threads = num_tokens > 64 && vectors <= 2 * kMaxThreads ? kMaxThreads : 512;
  int per_thread = 2;
  while (per_thread < kMostVectors && divide_up(vectors, per_thread) > most_threads) per_thread *= 2;
  const auto threads = static_cast<unsigned>(divide_up(divide_up(vectors, per_thread), 32) * 32);
  const unsigned rows = std::max(1u, 128 / threads);
  const dim3 grid(static_cast<unsigned>(divide_up(num_tokens, rows)));
  const dim3 block(threads, rows);
  const auto run = [&](auto kernel) {
    return launch_dependent(kernel, grid, block, 0, 1, stream, x, num_tokens, in_features, row_stride, quantized,
                            token_scale);
  };
  switch (per_thread) {
    case 2:
      return run(quantize_rows<T, 2>);
    case 4:
      return run(quantize_rows<T, 4>);
    default:
      return run(quantize_rows<T, kMostVectors>);
  }
}

}  // namespace

cudaError_t launch_quantize_per_token(const void* x, InputType input_type, int64_t num_tokens, int64_t in_features,
                                      int64_t row_stride, int8_t* quantized, float* token_scale, cudaStream_t stream) {
  if (num_tokens == 0) return cudaSuccess;
  if (num_tokens > INT32_MAX) return cudaErrorInvalidValue;
  switch (input_type) {
    case InputType::kFloat16:
      return launch(static_cast<const __half*>(x), num_tokens, in_features, row_stride, quantized, token_scale, stream);
    case InputType::kBFloat16:
      return launch(static_cast<const __nv_bfloat16*>(x), num_tokens, in_features, row_stride, quantized, token_scale,
                    stream);
    case InputType::kFloat32:
      return launch(static_cast<const float*>(x), num_tokens, in_features, row_stride, quantized, token_scale, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace marlin_qqq::cuda
