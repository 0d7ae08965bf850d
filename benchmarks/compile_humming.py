"""Compiles Humming's kernels of given shapes into its cache, so that a benchmark does not wait for them.

    python benchmarks/compile_humming.py 8192x21760,4096x4096

Needs a GPU and the package humming-kernels. Runs in a process of its own beside other work on the GPU's host.
"""

from __future__ import annotations

import sys
import time

import torch

from marlin_qqq.bench.environment import l2_bytes
from marlin_qqq.bench.implementations.base import Context
from marlin_qqq.bench.implementations.humming import compile_ahead
from marlin_qqq.bench.presets import parse_shape


def main() -> int:
    shapes = [parse_shape(text) for text in sys.argv[1].split(",")]
    start = time.monotonic()
    context = Context("cuda:0", torch.float16, l2_bytes("cuda:0"))
    problem = compile_ahead([(shape.out_features, shape.in_features) for shape in shapes], (-1, 128), context)
    print(problem or f"humming: {len(shapes)} shapes compiled in {time.monotonic() - start:.0f} s", flush=True)
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main())
