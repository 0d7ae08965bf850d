// The little of torch that every file in this folder needs, on the stable C shim: dtype codes, allocation, errors.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

namespace marlin_qqq::torch_ops {

using torch::stable::Tensor;

// Raises the Python RuntimeError that a user sees: "op: message". No file and line, which mean nothing to them.
template <typename... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream message;
  message << op << ": ";
  ((message << parts), ...);
  throw std::runtime_error(message.str());
}

// torch's codes for dtypes, asked once: Tensor::scalar_type() makes a dozen calls to translate one.
struct DtypeCodes {
  int32_t int8 = aoti_torch_dtype_int8();
  int32_t int32 = aoti_torch_dtype_int32();
  int32_t float16 = aoti_torch_dtype_float16();
  int32_t bfloat16 = aoti_torch_dtype_bfloat16();
  int32_t float32 = aoti_torch_dtype_float32();
};

inline const DtypeCodes& dtype_codes() {
  static const DtypeCodes codes;
  return codes;
}

inline int32_t dtype_code(const Tensor& tensor) {
  int32_t code;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &code));
  return code;
}

inline int32_t device_type_code(const Tensor& tensor) {
  int32_t code;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &code));
  return code;
}

// For messages: "float16", "cuda:0", "[3, 128]".
std::string dtype_name(int32_t dtype_code);
std::string dtype_name(torch::headeronly::ScalarType dtype);
std::string device_name(int32_t device_type, int32_t device_index);
std::string shape_name(const Tensor& tensor);
std::string shape_name(const int64_t* sizes, int64_t rank);

// Uninitialised, row-major, on the given device, from torch's allocator. What `op` cannot have is an error with bytes,
// shape and device; its type is RuntimeError, for torch's C functions let no exception through.
Tensor empty(const char* op, std::initializer_list<int64_t> sizes, int32_t dtype, int32_t device_type,
             int32_t device_index);
Tensor empty(const char* op, const int64_t* sizes, int64_t rank, int32_t dtype, int32_t device_type,
             int32_t device_index);
// The same for a row-major copy.
Tensor contiguous_copy(const char* op, const Tensor& tensor);

}  // namespace marlin_qqq::torch_ops
