"""The Triton kernels that measure ceilings: a plain read, a chain of reads, and a loop of int8 tensor-core products.

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
# (words of weights a block reads, warps) of the chained read.
CHAINED_READ_VARIANTS: tuple[tuple[int, int], ...] = ((8192, 8), (16384, 16))


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
def _chained_read_kernel(
    weights,
    activations,
    output,
    num_words,
    num_tokens,
    row_words,
    output_words,
    share_words,
    CHUNK: tl.constexpr,
    TOKENS: tl.constexpr,
    ROW: tl.constexpr,
    STEP: tl.constexpr,
):
    block = tl.program_id(0)
    tl.extra.cuda.gdc_launch_dependents()
    words = block * CHUNK + tl.arange(0, CHUNK)
    fetched = tl.reduce(tl.load(weights + words, mask=words < num_words, other=0), 0, _xor)
    tl.extra.cuda.gdc_wait()
    token = tl.arange(0, TOKENS)[:, None]
    column = block % tl.cdiv(row_words, ROW) * ROW + tl.arange(0, ROW)[None, :]
    there = (token < num_tokens) & (column < row_words)
    rows = tl.load(activations + token * row_words + column, mask=there, other=0)
    result = tl.reduce(tl.reshape(rows, [TOKENS * ROW]), 0, _xor) ^ fetched
    end = tl.minimum((block + 1) * share_words, output_words)
    for start in range(block * share_words, end, STEP):
        share = start + tl.arange(0, STEP)
        tl.store(output + share, tl.zeros([STEP], dtype=tl.int32) + result, mask=share < end)


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


def launch_chained_read(
    weights: torch.Tensor, activations: torch.Tensor, output: torch.Tensor, variant: tuple[int, int]
) -> torch.Tensor:
    """Enqueues, under programmatic dependent launch, what a product does besides its arithmetic.

    ``weights`` (int32, contiguous) are read before the wait for the kernel ahead, a part a block; then a block reads
    its part of ``activations`` (int32 ``[num_tokens, in_features / 4]``) and writes its part of ``output`` (int32,
    contiguous), which depends on all it has read.
    """
    chunk, num_warps = variant
    blocks = triton.cdiv(weights.numel(), chunk)
    num_tokens, row_words = activations.shape
    _chained_read_kernel[(blocks,)](
        weights,
        activations,
        output,
        weights.numel(),
        num_tokens,
        row_words,
        output.numel(),
        triton.cdiv(output.numel(), blocks),
        CHUNK=chunk,
        TOKENS=triton.next_power_of_2(num_tokens),
        ROW=chunk // 32,  # a word of weights is eight: 64 features of as many inputs as there are bytes in a row's part
        STEP=128,
        num_warps=num_warps,
        launch_pdl=True,
    )
    return output


def launch_int8_rate(a: torch.Tensor, b: torch.Tensor, sink: torch.Tensor, blocks: int, repeats: int) -> None:
    """Enqueues ``blocks`` x ``repeats`` products of a [M, K] and b [N, K] int8 into ``sink`` [M * N] int32."""
    (m, k), n = a.shape, b.shape[0]
    _int8_rate_kernel[(blocks,)](a, b, sink, repeats, M=m, N=n, K=k, num_warps=4)
