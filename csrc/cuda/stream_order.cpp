#include "cuda/stream_order.h"

#include <cstddef>

namespace marlin_qqq::cuda {
namespace {

// What a capture knows of its stream. Inactive outside of captures, and where the stream does not say.
struct Capture {
  bool active = false;
  unsigned long long id = 0;       // of the capture: no other one of the process has it
  cudaGraphNode_t last = nullptr;  // the one node that the stream's next one depends on, if it is one
};

Capture capture_of(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  const cudaGraphNode_t* nodes = nullptr;
  size_t count = 0;
#if CUDART_VERSION >= 12030
  const cudaGraphEdgeData* edges = nullptr;
#endif
#if CUDART_VERSION >= 13000
  const cudaError_t error = cudaStreamGetCaptureInfo(stream, &status, &id, nullptr, &nodes, &edges, &count);
#elif CUDART_VERSION >= 12030
  const cudaError_t error = cudaStreamGetCaptureInfo_v3(stream, &status, &id, nullptr, &nodes, &edges, &count);
#else
  const cudaError_t error = cudaStreamGetCaptureInfo_v2(stream, &status, &id, nullptr, &nodes, &count);
#endif
  if (error != cudaSuccess) {
    (void)cudaGetLastError();  // such as the legacy stream's while another one is captured: not this launch's failure
    return {};
  }
  return {status == cudaStreamCaptureStatusActive, id, count == 1 ? nodes[0] : nullptr};
}

// Our last launch that a graph has captured. One a thread: of captures that this thread goes on with in turns, each
// finds another's node, and its next launch counts as one that stands alone.
struct CapturedLaunch {
  unsigned long long capture = 0;
  cudaGraphNode_t node = nullptr;
  bool standalone = false;
};

thread_local CapturedLaunch last_launch;

}  // namespace

bool stands_alone(cudaStream_t stream) {
  const Capture capture = capture_of(stream);
  if (!capture.active) return false;
  const bool follows_ours =
      capture.last != nullptr && capture.last == last_launch.node && capture.id == last_launch.capture;
  return !follows_ours || last_launch.standalone;
}

void remember_launch(cudaStream_t stream, bool standalone) {
  const Capture capture = capture_of(stream);
  if (capture.active) last_launch = {capture.id, capture.last, standalone};
}

}  // namespace marlin_qqq::cuda
