"""marlin_qqq_gemm on the CPU against torch.matmul in fp32: same shape, same thread.

One thread, and its CPU time instead of the wall clock, so that the table can be made on a machine that has other work
to do; `marlin-qqq bench gemm --device cpu` measures all threads by the wall clock. The least time of many runs counts.

    PYTHONPATH=python python benchmarks/cpu_gemm.py --shape 4096x4096 --num-tokens 1,16,64,256
    MARLIN_QQQ_CPU_LEVEL=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ATEN_CPU_CAPABILITY=avx2 PYTHONPATH=python \\
        python benchmarks/cpu_gemm.py                                     # what a processor without AVX-512 would do
"""

import argparse
import time
from collections.abc import Callable

import torch

import marlin_qqq


def least_cpu_ms(run: Callable[[], object], seconds: float) -> float:
    """Least CPU time of one call, in ms, of as many calls as fit into `seconds` (three at least)."""
    run()  # first calls allocate
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return 1e3 * min(times)


def measure(num_tokens: int, out_features: int, in_features: int, seconds: float) -> str:
    """One row of the table."""
    x = torch.randn(num_tokens, in_features)
    dense = torch.randn(out_features, in_features)
    fp32_ms = least_cpu_ms(lambda: torch.matmul(x, dense.T), seconds)
    a, s_tok = marlin_qqq.quantize_per_token(x)
    workspace = marlin_qqq.make_workspace(out_features, "cpu")
    row = f"{out_features}x{in_features:<6} {num_tokens:5} {fp32_ms:10.2f}"
    for group_size in (-1, 128):
        codes = torch.randint(-8, 8, (in_features, out_features), dtype=torch.int8)
        packed = marlin_qqq.pack_weight(codes, group_size)
        s_channel = torch.rand(1, out_features)
        s_group = torch.rand(in_features // 128 if group_size == 128 else 0, out_features).mul(15).half()
        arguments = (a, packed, s_tok, s_channel, s_group, workspace, num_tokens, out_features, in_features)
        milliseconds = least_cpu_ms(lambda call=arguments: marlin_qqq.marlin_qqq_gemm(*call), seconds)
        row += f" {milliseconds:10.2f} {fp32_ms / milliseconds:6.1f}x"
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=["4096x4096"], help="NxK, out_features x in_features")
    parser.add_argument("--num-tokens", default="1,4,16,64,256")
    parser.add_argument("--seconds", type=float, default=0.5, help="CPU time for each measurement")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'N x K':11} {'M':>5} {'fp32 ms':>10} {'channel ms':>10} {'ratio':>7} {'group ms':>10} {'ratio':>7}")
    for shape in options.shape:
        out_features, in_features = map(int, shape.split("x"))
        for num_tokens in map(int, options.num_tokens.split(",")):
            print(measure(num_tokens, out_features, in_features, options.seconds), flush=True)


if __name__ == "__main__":
    main()
