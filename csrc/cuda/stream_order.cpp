#include "cuda/stream_order.h"

#include <cstddef>

#include "cuda/launch_order.h"

namespace marlin_qqq::cuda {
namespace {

Capture capture_of(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  const cudaGraphNode_t* nodes = nullptr;
  size_t count = 0;
  const cudaGraphEdgeData* edges = nullptr;  // not asked for, programmatic ones would be an error
#if CUDART_VERSION >= 13000
  const cudaError_t error = cudaStreamGetCaptureInfo(stream, &status, &id, nullptr, &nodes, &edges, &count);
#else
  const cudaError_t error = cudaStreamGetCaptureInfo_v3(stream, &status, &id, nullptr, &nodes, &edges, &count);
#endif
  if (error != cudaSuccess) {
    (void)cudaGetLastError();  // such as the legacy stream's while another one is captured: not this launch's failure
    return {};
  }
  return {status == cudaStreamCaptureStatusActive, id, count == 1 ? nodes[0] : nullptr};
}

thread_local LaunchOrder launch_order;

}  // namespace

bool stands_alone(cudaStream_t stream) { return launch_order.stands_alone(capture_of(stream)); }

void remember_launch(cudaStream_t stream, bool next_stands_alone) {
  launch_order.remember(capture_of(stream), next_stands_alone);
}

}  // namespace marlin_qqq::cuda
