// More than 48 KB of dynamic shared memory must be asked for, once a kernel and device.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>

namespace marlin_qqq::cuda {

// `done`: the caller's static record for this kernel, a bit a device.
inline cudaError_t allow_shared_memory(std::atomic<uint64_t>& done, const void* kernel, int bytes) {
  int device = 0;
  if (cudaError_t error = cudaGetDevice(&device)) return error;
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if (done.load(std::memory_order_relaxed) & bit) return cudaSuccess;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) done.fetch_or(bit, std::memory_order_relaxed);
  return error;
}

}  // namespace marlin_qqq::cuda
