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

StreamOrder::StreamOrder(cudaStream_t stream) : stream_(stream) {
  const Capture capture = capture_of(stream);
  captured_ = capture.active;
  stands_alone_ = launch_order.stands_alone(capture);
}

void StreamOrder::remember_launch(bool next_stands_alone) const {
  if (captured_) launch_order.remember(capture_of(stream_), next_stands_alone);
}

}  // namespace marlin_qqq::cuda
