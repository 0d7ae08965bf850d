"""What the GPU of this run can do at all: read bandwidth and the int8 tensor-core rate, measured beside the kernels.

The floor of a problem is the larger of its bytes over the one and its operations over the other.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

from marlin_qqq.bench.problem import Ceilings

# Dense int8 rates (TOPS) that a loop of wgmma m64n256k32 on random data sustained for 23 ms, operands in shared
# memory: docs/benchmark.md, "Ceilings". Used when the rate measured in the run is lower, and said so.
KNOWN_INT8_TOPS = {"H200": 1910.0, "H100": 1920.0}

Variant = TypeVar("Variant")

READ_BYTES = 2 << 30
WARM_UP_SECONDS = 0.1
RATE_BLOCKS_PER_SM = 6
RATE_REPEATS = 4096


def measure_ceilings(device: str) -> tuple[Ceilings, dict[str, Any]]:
    """The ceilings of ``device`` and the details of how they came about. A CPU has none: its floor is not shown."""
    if not device.startswith("cuda"):
        return Ceilings(), {"note": "no ceilings are measured on a CPU"}
    import torch

    details: dict[str, Any] = {}
    read_gbps, read_source = _attempt(details, "read", lambda: _read_bandwidth(device))
    int_mm_tops, _ = _attempt(details, "int_mm", lambda: (_int_mm_rate(device), ""))
    loop_tops, _ = _attempt(details, "tensor_core_loop", lambda: (_tensor_core_loop_rate(device), ""))
    details["int_mm_tops"] = int_mm_tops
    details["tensor_core_loop_tops"] = loop_tops

    measured = [
        (rate, source)
        for rate, source in (
            (loop_tops, "loop of int8 tensor-core products (Triton), this run"),
            (int_mm_tops, "torch._int_mm 8192x8192x8192, this run (a lower bound)"),
        )
        if rate
    ]
    name = torch.cuda.get_device_name(device)
    known = next((rate for part, rate in KNOWN_INT8_TOPS.items() if part in name), None)
    int8_tops, int8_source = max(measured, default=(None, "not measured"))
    if known and (int8_tops is None or int8_tops < known):
        int8_tops, int8_source = known, f"known rate of {name} (docs/benchmark.md); the run's own loops reached less"
    ceilings = Ceilings(read_gbps, read_source, int8_tops, int8_source)
    details |= {
        "read_gbps": read_gbps,
        "read_source": read_source,
        "int8_tops": int8_tops,
        "int8_source": int8_source,
    }
    torch.cuda.empty_cache()
    return ceilings, details


def _attempt(
    details: dict[str, Any], name: str, measure: Callable[[], tuple[float | None, str]]
) -> tuple[float | None, str]:
    """A ceiling that cannot be measured is left out with the reason; the benchmark goes on."""
    try:
        return measure()
    except Exception as error:
        details[f"{name}_error"] = f"{type(error).__name__}: {error}"
        return None, "not measured"


def _read_bandwidth(device: str) -> tuple[float, str]:
    import torch

    source = torch.randint(-(2**31), 2**31 - 1, (READ_BYTES // 4,), dtype=torch.int32, device=device)
    try:
        launches = {str(variant): launch for variant, launch in read_kernels(device).items()}
        origin = "plain read kernel (Triton)"
    except ImportError:
        launches = {"sum": lambda tensor: tensor.view(torch.float32).sum()}
        origin = "torch.sum"
    best = 0.0
    for launch in launches.values():
        best = max(best, READ_BYTES / _event_us(partial(launch, source)) / 1e3)
    return best, f"{origin} over {READ_BYTES >> 20} MiB, this run"


def read_kernels(device: str) -> dict[tuple[int, int, int], Callable[[Any], Any]]:
    """The variants of the plain read kernel, each as a function of an int32 tensor. ImportError without Triton."""
    import torch

    from marlin_qqq.bench import triton_kernels

    sink = torch.empty(1 << 20, dtype=torch.int32, device=device)
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count

    def bind(variant: tuple[int, int, int]) -> Callable[[Any], Any]:
        return lambda source: triton_kernels.launch_read(source, sink, num_sms, variant)

    return {variant: bind(variant) for variant in triton_kernels.READ_VARIANTS}


def fastest_read_kernel(sources: list[Any], device: str) -> tuple[tuple[int, int, int], Callable[[Any], Any]]:
    """The read variant that is fastest over these int32 tensors in turn, back to back in a CUDA graph."""
    kernels = read_kernels(device)

    def bind(read: Callable[[Any], Any]) -> Callable[[int], Any]:
        return lambda index: read(sources[index % len(sources)])

    launches = {variant: bind(read) for variant, read in kernels.items()}
    best = fastest_launch(launches, len(sources), 4 * sources[0].numel())
    return best, kernels[best]


def fastest_launch(launches: Mapping[Variant, Callable[[int], Any]], copies: int, bytes_read: int) -> Variant:
    """The key of the fastest of these functions of the launch's index, which read ``bytes_read`` of one of ``copies``.

    They are timed back to back in a CUDA graph.
    """
    from marlin_qqq.bench.timing import CapturedLaunches, num_launches, time_graphs

    count = num_launches(copies, bytes_read / 4e6)
    graphs = {str(variant): CapturedLaunches(launch, count) for variant, launch in launches.items()}
    samples = time_graphs(graphs, replays=5, warmup_us=5e3)
    return min(launches, key=lambda variant: samples[str(variant)].median_us)


def _tensor_core_loop_rate(device: str) -> float:
    import torch

    from marlin_qqq.bench import triton_kernels

    num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    a = torch.randint(-128, 128, (64, 128), dtype=torch.int8, device=device)
    b = torch.randint(-128, 128, (256, 128), dtype=torch.int8, device=device)
    sink = torch.empty(64 * 256, dtype=torch.int32, device=device)
    blocks = RATE_BLOCKS_PER_SM * num_sms
    microseconds = _event_us(lambda: triton_kernels.launch_int8_rate(a, b, sink, blocks, RATE_REPEATS))
    return 2 * 64 * 256 * 128 * RATE_REPEATS * blocks / microseconds / 1e6


def _int_mm_rate(device: str) -> float:
    import torch

    size = 8192
    a = torch.randint(-128, 128, (size, size), dtype=torch.int8, device=device)
    b = torch.randint(-128, 128, (size, size), dtype=torch.int8, device=device)
    return 2 * size**3 / _event_us(lambda: torch._int_mm(a, b.t())) / 1e6


def _event_us(launch: Callable[[], Any], repeats: int = 7) -> float:
    """Median time of one launch between events, after enough of them for the clocks to rise."""
    import torch

    end_of_warm_up = time.monotonic() + WARM_UP_SECONDS
    launch()
    torch.cuda.synchronize()
    while time.monotonic() < end_of_warm_up:
        launch()
        torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(200_000)  # the host enqueues while the device sleeps
        start.record()
        launch()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times)
