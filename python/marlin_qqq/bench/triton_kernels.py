"""The two Triton kernels that measure ceilings: a plain read, and a loop of int8 tensor-core products.

Triton comes with torch's CUDA wheels. This module is imported only when a GPU is there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# (values a block reads at a time, warps, blocks an SM; 0: one block for each chunk). The best of them is the ceiling.
READ_VARIANTS: tuple[tuple[int, int, int], ...] = (
    (8192, 8, 0),
    (4096, 4, 0),
    (8192, 8, 4),
    (4096, 8, 8),
)


@triton.jit
def _xor(left, right):
    return left ^ right


@triton.jit
def _read_kernel(source, sink, num_values, CHUNK: tl.constexpr, WHOLE_CHUNKS: tl.constexpr):
    total = tl.zeros([CHUNK], dtype=tl.int32)
    offsets = tl.arange(0, CHUNK)
    for start in range(tl.program_id(0) * CHUNK, num_values, tl.num_programs(0) * CHUNK):
        index = start + offsets
        if WHOLE_CHUNKS:
            total ^= tl.load(source + index)
        else:
            total ^= tl.load(source + index, mask=index < num_values, other=0)
    result = tl.reduce(total, 0, _xor)
    # Never true for random data; the compiler cannot know, so the loads stay.
    tl.store(sink + tl.program_id(0), result, mask=result == 0x5EED5EED)


@triton.jit
def _int8_rate_kernel(a, b, sink, repeats, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    rows = tl.arange(0, M)
    columns = tl.arange(0, N)
    depth = tl.arange(0, K)
    left = tl.load(a + rows[:, None] * K + depth[None, :])
    right = tl.load(b + columns[None, :] * K + depth[:, None])
    accumulator = tl.zeros([M, N], dtype=tl.int32)
    for _ in range(repeats):
        accumulator = tl.dot(left, right, accumulator, out_dtype=tl.int32)
    tl.store(sink + rows[:, None] * N + columns[None, :], accumulator)


def launch_read(source: torch.Tensor, sink: torch.Tensor, num_sms: int, variant: tuple[int, int, int]) -> torch.Tensor:
    """Enqueues a kernel that reads all of ``source`` (int32, contiguous) once and writes nothing."""
    chunk, num_warps, blocks_per_sm = variant
    chunks = triton.cdiv(source.numel(), chunk)
    blocks = min(chunks, blocks_per_sm * num_sms) if blocks_per_sm else chunks
    whole_chunks = source.numel() % chunk == 0
    _read_kernel[(blocks,)](source, sink, source.numel(), CHUNK=chunk, WHOLE_CHUNKS=whole_chunks, num_warps=num_warps)
    return sink


def launch_int8_rate(a: torch.Tensor, b: torch.Tensor, sink: torch.Tensor, blocks: int, repeats: int) -> None:
    """Enqueues ``blocks`` x ``repeats`` products of a [M, K] and b [N, K] int8 into ``sink`` [M * N] int32."""
    (m, k), n = a.shape, b.shape[0]
    _int8_rate_kernel[(blocks,)](a, b, sink, repeats, M=m, N=n, K=k, num_warps=4)
