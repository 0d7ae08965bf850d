#include "cuda/common/tensor_map.h"

namespace marlin_qqq::cuda {
namespace {

// The driver's function is looked up at run time, so that the library does not link against the driver and loads on
// machines without one.
decltype(&cuTensorMapEncodeTiled) encode_function() {
  static const auto function = [] {
    void* pointer = nullptr;
    cudaDriverEntryPointQueryResult result{};
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &pointer, 12000, cudaEnableDefault, &result) !=
            cudaSuccess ||
        result != cudaDriverEntryPointSuccess) {
      pointer = nullptr;
    }
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(pointer);
  }();
  return function;
}

}  // namespace

cudaError_t encode_tensor_map(CUtensorMap* map, ElementType type, const void* matrix, uint64_t rows, uint64_t columns,
                              int box_rows, int box_columns, bool swizzle) {
  const auto encode = encode_function();
  if (encode == nullptr) return cudaErrorNotSupported;
  const CUtensorMapDataType data_type = type == ElementType::kInt8     ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                                        : type == ElementType::kUInt16 ? CU_TENSOR_MAP_DATA_TYPE_UINT16
                                                                       : CU_TENSOR_MAP_DATA_TYPE_UINT32;
  const uint64_t element_bytes = type == ElementType::kInt8 ? 1 : type == ElementType::kUInt16 ? 2 : 4;
  const cuuint64_t sizes[2] = {columns, rows};
  const cuuint64_t strides[1] = {columns * element_bytes};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult result =
      encode(map, data_type, 2, const_cast<void*>(matrix), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             swizzle ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace marlin_qqq::cuda
