#include "torch/tensor_helpers.h"

#include <vector>

namespace marlin_qqq::torch_ops {

std::string dtype_name(int32_t code) {
  const DtypeCodes& known = dtype_codes();
  if (code == known.int8) return "int8";
  if (code == known.int32) return "int32";
  if (code == known.float16) return "float16";
  if (code == known.bfloat16) return "bfloat16";
  if (code == known.float32) return "float32";
  if (code == aoti_torch_dtype_float64()) return "float64";
  if (code == aoti_torch_dtype_uint8()) return "uint8";
  if (code == aoti_torch_dtype_int16()) return "int16";
  if (code == aoti_torch_dtype_int64()) return "int64";
  if (code == aoti_torch_dtype_bool()) return "bool";
  return "dtype number " + std::to_string(code);
}

std::string device_name(int32_t device_type, int32_t device_index) {
  if (device_type == aoti_torch_device_type_cpu()) return "cpu";
  if (device_type == aoti_torch_device_type_cuda()) return "cuda:" + std::to_string(device_index);
  if (device_type == aoti_torch_device_type_meta()) return "meta";
  return "device type " + std::to_string(device_type) + ":" + std::to_string(device_index);
}

std::string shape_name(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(tensor.size(i));
  return text + "]";
}

Tensor empty(const int64_t* sizes, int64_t rank, int32_t dtype, int32_t device_type, int32_t device_index) {
  std::vector<int64_t> strides(rank);
  int64_t stride = 1;
  for (int64_t i = rank - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= sizes[i] > 0 ? sizes[i] : 1;
  }
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(rank, sizes, strides.data(), dtype, device_type, device_index, &handle));
  return Tensor(handle);
}

Tensor empty(std::initializer_list<int64_t> sizes, int32_t dtype, int32_t device_type, int32_t device_index) {
  return empty(sizes.begin(), static_cast<int64_t>(sizes.size()), dtype, device_type, device_index);
}

}  // namespace marlin_qqq::torch_ops
