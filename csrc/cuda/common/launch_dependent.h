// Launches with programmatic dependent launch, where the device has it (compute capability 9.0 and later).
#pragma once

#include <cuda_runtime_api.h>

namespace marlin_qqq::cuda {

// cluster: blocks of a cluster, 1 for none. The kernel must call wait_for_previous_kernel (dependent_launch.cuh).
template <class... Arguments, class... Values>
cudaError_t launch_dependent(void (*kernel)(Arguments...), dim3 grid, dim3 block, int shared_memory_bytes, int cluster,
                             cudaStream_t stream, Values... values) {
  int device = 0;
  int major = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = cluster;
  attributes[1].val.clusterDim.y = 1;
  attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_memory_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = major < 9 ? 0 : cluster > 1 ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Arguments>(values)...);
}

}  // namespace marlin_qqq::cuda
