#include "torch/tensor_helpers.h"

#include <torch/csrc/stable/ops.h>

#include <vector>

namespace marlin_qqq::torch_ops {

std::string dtype_name(int32_t code) {
  struct Name {
    int32_t code;
    const char* name;
  };
  const Name names[] = {
      {aoti_torch_dtype_int8(), "int8"},
      {aoti_torch_dtype_int16(), "int16"},
      {aoti_torch_dtype_int32(), "int32"},
      {aoti_torch_dtype_int64(), "int64"},
      {aoti_torch_dtype_uint8(), "uint8"},
      {aoti_torch_dtype_uint16(), "uint16"},
      {aoti_torch_dtype_uint32(), "uint32"},
      {aoti_torch_dtype_uint64(), "uint64"},
      {aoti_torch_dtype_bool(), "bool"},
      {aoti_torch_dtype_float16(), "float16"},
      {aoti_torch_dtype_bfloat16(), "bfloat16"},
      {aoti_torch_dtype_float32(), "float32"},
      {aoti_torch_dtype_float64(), "float64"},
      {aoti_torch_dtype_float8_e4m3fn(), "float8_e4m3fn"},
      {aoti_torch_dtype_float8_e4m3fnuz(), "float8_e4m3fnuz"},
      {aoti_torch_dtype_float8_e5m2(), "float8_e5m2"},
      {aoti_torch_dtype_float8_e5m2fnuz(), "float8_e5m2fnuz"},
      {aoti_torch_dtype_complex32(), "complex32"},
      {aoti_torch_dtype_complex64(), "complex64"},
      {aoti_torch_dtype_complex128(), "complex128"},
  };
  for (const Name& known : names) {
    if (code == known.code) return known.name;
  }
  return "dtype number " + std::to_string(code);
}

std::string dtype_name(torch::headeronly::ScalarType dtype) {
  // Our headers' number of a dtype need not be that of the torch that runs.
  return dtype_name(torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)));
}

std::string device_name(int32_t device_type, int32_t device_index) {
  if (device_type == aoti_torch_device_type_cpu()) return "cpu";
  if (device_type == aoti_torch_device_type_cuda()) return "cuda:" + std::to_string(device_index);
  if (device_type == aoti_torch_device_type_meta()) return "meta";
  return "device type " + std::to_string(device_type) + ":" + std::to_string(device_index);
}

std::string shape_name(const int64_t* sizes, int64_t rank) {
  std::string text = "[";
  for (int64_t i = 0; i < rank; ++i) text += (i == 0 ? "" : ", ") + std::to_string(sizes[i]);
  return text + "]";
}

namespace {

std::vector<int64_t> sizes_of(const Tensor& tensor) {
  std::vector<int64_t> sizes(tensor.dim());
  for (int64_t i = 0; i < tensor.dim(); ++i) sizes[i] = tensor.size(i);
  return sizes;
}

// All that a C function of torch says is that it failed. Of a CPU allocation whose sizes are sound there is one reason;
// CUDA's may as well be an error of a kernel before it.
[[noreturn]] void fail_to_allocate(const char* op, const int64_t* sizes, int64_t rank, int32_t dtype,
                                   int32_t device_type, int32_t device_index) {
  auto bytes = static_cast<int64_t>(aoti_torch_dtype_element_size(dtype));
  bool countable = true;
  for (int64_t i = 0; i < rank; ++i) countable = countable && !__builtin_mul_overflow(bytes, sizes[i], &bytes);
  const bool on_cpu = device_type == aoti_torch_device_type_cpu();
  fail(op, countable && on_cpu ? "out of memory: " : "", "cannot allocate ",
       countable ? std::to_string(bytes) : std::string("2^63 or more"), " bytes on ",
       device_name(device_type, device_index), " for shape ", shape_name(sizes, rank), " of ", dtype_name(dtype),
       countable && !on_cpu ? " (out of memory, or an error of earlier work on the device)" : "");
}

}  // namespace

std::string shape_name(const Tensor& tensor) {
  const std::vector<int64_t> sizes = sizes_of(tensor);
  return shape_name(sizes.data(), tensor.dim());
}

Tensor empty(const char* op, const int64_t* sizes, int64_t rank, int32_t dtype, int32_t device_type,
             int32_t device_index) {
  std::vector<int64_t> strides(rank);
  int64_t stride = 1;
  for (int64_t i = rank - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= sizes[i] > 0 ? sizes[i] : 1;
  }
  AtenTensorHandle handle;
  if (aoti_torch_empty_strided(rank, sizes, strides.data(), dtype, device_type, device_index, &handle) !=
      AOTI_TORCH_SUCCESS) {
    fail_to_allocate(op, sizes, rank, dtype, device_type, device_index);
  }
  return Tensor(handle);
}

Tensor empty(const char* op, std::initializer_list<int64_t> sizes, int32_t dtype, int32_t device_type,
             int32_t device_index) {
  return empty(op, sizes.begin(), static_cast<int64_t>(sizes.size()), dtype, device_type, device_index);
}

Tensor contiguous_copy(const char* op, const Tensor& tensor) {
  try {
    return torch::stable::contiguous(tensor);
  } catch (const std::exception&) {
    fail_to_allocate(op, sizes_of(tensor).data(), tensor.dim(), dtype_code(tensor), device_type_code(tensor),
                     tensor.get_device_index());
  }
}

}  // namespace marlin_qqq::torch_ops
