// Descriptions of row-major matrices for TMA (CUDA Driver API, cuTensorMapEncodeTiled).
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace marlin_qqq::cuda {

enum class ElementType { kInt8, kUInt16, kUInt32 };

// matrix [rows, columns], contiguous, 16-byte aligned; copies move boxes of box_rows x box_columns. swizzle: rows of a
// box are 128 bytes, and their 16-byte pieces are permuted by the row number modulo 8.
cudaError_t encode_tensor_map(CUtensorMap* map, ElementType type, const void* matrix, uint64_t rows, uint64_t columns,
                              int box_rows, int box_columns, bool swizzle);

}  // namespace marlin_qqq::cuda
