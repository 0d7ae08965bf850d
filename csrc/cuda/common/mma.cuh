// Warp-level pieces of the mma.sync path: matrix product, matrix load.
#pragma once

#include <cstdint>

namespace marlin_qqq::cuda {

// sums += A[16, 32] x B[32, 8]: int8 operands, int32 sums. PTX ISA, mma.m16n8k32.
__device__ __forceinline__ void mma_int8(int32_t (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four blocks of 8 rows x 16 bytes: lane l gives the address of row l % 8 of block l / 8. PTX ISA, ldmatrix.
__device__ __forceinline__ void load_matrix(uint32_t (&blocks)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(blocks[0]), "=r"(blocks[1]), "=r"(blocks[2]), "=r"(blocks[3])
               : "r"(address)
               : "memory");
}

// The same for two blocks: lanes 0..15 give the addresses.
__device__ __forceinline__ void load_matrix_pair(uint32_t& block0, uint32_t& block1, uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(block0), "=r"(block1)
               : "r"(address)
               : "memory");
}

}  // namespace marlin_qqq::cuda
