#include "cuda/gemm.h"

#include <array>
#include <atomic>

#include "cuda/sm80/launch.h"
#include "cuda/sm90/launch.h"

namespace marlin_qqq::cuda {
namespace {

cudaError_t query_properties(int device, plan::DeviceProperties* properties) {
  const auto attribute = [&](cudaDeviceAttr name, int* value) { return cudaDeviceGetAttribute(value, name, device); };
  int major = 0, minor = 0, num_sms = 0, l2_bytes = 0, shared = 0, memory_khz = 0, bus_bits = 0, clock_khz = 0;
  cudaError_t error = attribute(cudaDevAttrComputeCapabilityMajor, &major);
  if (error == cudaSuccess) error = attribute(cudaDevAttrComputeCapabilityMinor, &minor);
  if (error == cudaSuccess) error = attribute(cudaDevAttrMultiProcessorCount, &num_sms);
  if (error == cudaSuccess) error = attribute(cudaDevAttrL2CacheSize, &l2_bytes);
  if (error == cudaSuccess) error = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, &shared);
  if (error == cudaSuccess) error = attribute(cudaDevAttrMemoryClockRate, &memory_khz);
  if (error == cudaSuccess) error = attribute(cudaDevAttrGlobalMemoryBusWidth, &bus_bits);
  if (error == cudaSuccess) error = attribute(cudaDevAttrClockRate, &clock_khz);
  if (error != cudaSuccess) return error;
  // Two transfers a clock; a device that hides its clocks counts as an average one.
  const double bandwidth = 2.0 * memory_khz * 1e3 * bus_bits / 8 / 1e9;
  *properties = {10 * major + minor,
                 num_sms,
                 l2_bytes,
                 shared,
                 bandwidth > 0 ? bandwidth : 2000.0,
                 clock_khz > 0 ? clock_khz / 1e6 : 1.7,
                 {}};
  if (properties->compute_capability == 90) {
    for (int size = 1; size <= 8 && error == cudaSuccess; ++size) {
      error = sm90::max_active_clusters(size, &properties->clusters[size - 1]);
    }
  }
  return error;
}

}  // namespace

cudaError_t current_device_properties(plan::DeviceProperties* properties) {
  constexpr int kDevices = 64;
  static std::array<plan::DeviceProperties, kDevices> cached;
  static std::array<std::atomic<int>, kDevices> state;  // 0: unknown, 1: being written, 2: known
  int device = 0;
  if (cudaError_t error = cudaGetDevice(&device)) return error;
  if (device < kDevices && state[device].load(std::memory_order_acquire) == 2) {
    *properties = cached[device];
    return cudaSuccess;
  }
  const cudaError_t error = query_properties(device, properties);
  if (error == cudaSuccess && device < kDevices) {
    int unknown = 0;
    if (state[device].compare_exchange_strong(unknown, 1)) {
      cached[device] = *properties;
      state[device].store(2, std::memory_order_release);
    }
  }
  return error;
}

cudaError_t launch_gemm(const plan::Plan& plan, const plan::Problem& problem, const GemmArguments& arguments,
                        void* scratch, cudaStream_t stream) {
  switch (plan.family) {
    case plan::Family::kNone:
      return cudaSuccess;
    case plan::Family::kSm80:
      return sm80::launch(plan, problem, arguments, scratch, stream);
    case plan::Family::kSm90:
      return sm90::launch(plan, problem, arguments, scratch, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace marlin_qqq::cuda
