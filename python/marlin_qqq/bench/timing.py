"""How a launch is timed.

On a GPU the unit is one CUDA graph of many launches that rotate over copies of the weights which together are larger
than L2, so that every launch finds its weights in device memory, as a model's layers do. The graphs of all
implementations are replayed in turn, in a new order each round, so that clocks and temperature are the same for all.
After each replay the GPU rests. Without the rests a compute-bound graph runs at whatever clock the power limit leaves
after the graphs before it, and the same kernel differs by up to 15 % from one run to the next; with them by under 1 %
(docs/benchmark.md). What the power limit does to long work is the sustained method's to show.

On a CPU it is the wall clock around one call, also in turn.
"""

from __future__ import annotations

import math
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

# The weights of one graph exceed L2 this many times: nothing survives from a copy's last use.
L2_MULTIPLE = 3.0
MINIMUM_LAUNCHES = 10
MAXIMUM_LAUNCHES = 400
# A graph shorter than this is dominated by the gaps between replays (a microsecond or two each).
MINIMUM_GRAPH_US = 250.0
# Outputs of a graph's launches stay alive up to this many bytes, so that launches do not rewrite lines that are in L2.
LIVE_OUTPUT_BYTES = 1 << 30
SUSTAINED_LAUNCHES = 400
# Before those, launches of the same kind, until the power limit has found its clock for them.
SETTLING_US = 1e5
# A rest, in times of the replay before it.
REST = 2.0
SLEEP_CYCLES_PER_US = 1800.0  # of torch.cuda._sleep, near enough

Launch = Callable[[int], Any]


@dataclass(frozen=True)
class Sample:
    """Times of one implementation, microseconds a launch."""

    median_us: float
    p10_us: float
    p90_us: float
    num_samples: int
    launches_per_sample: int
    sm_clock_mhz: float | None = None
    power_w: float | None = None


def summarise(times_us: Sequence[float], launches: int, **extra: float | None) -> Sample:
    """Median with p10 and p90 of ``times_us`` (already divided by the launches)."""
    p10, median, p90 = (float(value) for value in numpy.percentile(numpy.asarray(times_us), [10, 50, 90]))
    return Sample(median, p10, p90, len(times_us), launches, **extra)


def num_copies(bytes_per_copy: int, l2_bytes: int) -> int:
    """Copies of the weights that one graph has to rotate over: more than three times L2 in all, and at least two."""
    return max(2, math.floor(L2_MULTIPLE * l2_bytes / bytes_per_copy) + 1)


def num_launches(copies: int, expected_us: float) -> int:
    """Launches of one graph: whole rounds over the copies, at least 10, and long enough to be timed well."""
    wanted = max(MINIMUM_LAUNCHES, copies, min(MAXIMUM_LAUNCHES, math.ceil(MINIMUM_GRAPH_US / max(expected_us, 0.5))))
    return copies * math.ceil(wanted / copies)


class CapturedLaunches:
    """A CUDA graph of ``launches`` calls of ``launch``, with the outputs of its first and last launch kept."""

    def __init__(self, launch: Launch, launches: int) -> None:
        import torch

        self.launches = launches
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for index in range(2):  # lazy initialisation must not happen during capture
                launch(index)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()

        self.graph = torch.cuda.CUDAGraph()
        self.first_output: Any = None
        self.last_output: Any = None
        live: deque[Any] = deque()
        with torch.cuda.graph(self.graph, stream=stream):
            for index in range(launches):
                output = launch(index)
                if index == 0:
                    self.first_output = output
                    live = deque(maxlen=max(2, LIVE_OUTPUT_BYTES // max(_output_bytes(output), 1)))
                live.append(output)
                self.last_output = output
        self._live = live

    def replay(self) -> None:
        self.graph.replay()


def time_graphs(graphs: dict[str, CapturedLaunches], replays: int, warmup_us: float = 5e4) -> dict[str, Sample]:
    """Replays the graphs in turn with rests, ``replays`` rounds in a new order each; events time every replay."""
    import torch

    if not graphs:
        return {}
    once_us = _warm_up(graphs, warmup_us)
    generator = random.Random(0)
    names = list(graphs)
    events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in names}
    # The device sleeps while the host enqueues, so that no replay waits for the host.
    torch.cuda._sleep(2_000_000)
    for _ in range(replays):
        generator.shuffle(names)
        for name in names:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graphs[name].replay()
            end.record()
            torch.cuda._sleep(int(REST * once_us[name] * SLEEP_CYCLES_PER_US))
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {
        name: summarise(
            [start.elapsed_time(end) * 1e3 / graph.launches for start, end in events[name]],
            graph.launches,
        )
        for name, graph in graphs.items()
    }


def time_graphs_sustained(
    graphs: dict[str, CapturedLaunches], rounds: int, clocks: Callable[[], Any]
) -> dict[str, Sample]:
    """400 launches back to back, ``rounds`` times, the implementations in turn; the SM clock and power beside it.

    A tenth of a second of the same launches goes before them: without it, short ones would have the clock that the
    implementation before them left.

    ``clocks()`` is a context manager whose value has ``sm_clock_mhz`` and ``power_w`` after it ends.
    """
    import torch

    once_us = _warm_up(graphs, 5e4)
    times: dict[str, list[float]] = {name: [] for name in graphs}
    readings: dict[str, list[tuple[float | None, float | None]]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            repeats = max(1, math.ceil(SUSTAINED_LAUNCHES / graph.launches))
            for _ in range(math.ceil(SETTLING_US / once_us[name])):
                graph.replay()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            with clocks() as reading:
                start.record()
                for _ in range(repeats):
                    graph.replay()
                end.record()
                torch.cuda.synchronize()
            times[name].append(start.elapsed_time(end) * 1e3 / (repeats * graph.launches))
            readings[name].append((reading.sm_clock_mhz, reading.power_w))
    return {
        name: summarise(
            times[name],
            max(1, math.ceil(SUSTAINED_LAUNCHES / graph.launches)) * graph.launches,
            sm_clock_mhz=_median_or_none([clock for clock, _ in readings[name]]),
            power_w=_median_or_none([power for _, power in readings[name]]),
        )
        for name, graph in graphs.items()
    }


def time_on_cpu(
    launches: dict[str, Launch], minimum_seconds: float, minimum_samples: int = 5, maximum_samples: int = 200
) -> dict[str, Sample]:
    """Wall clock a call, the implementations in turn, each for ``minimum_seconds`` or ``minimum_samples`` calls."""
    for launch in launches.values():
        launch(0)
        launch(1)
    times: dict[str, list[float]] = {name: [] for name in launches}
    index = 0
    while launches:
        for name, launch in launches.items():
            start = time.perf_counter_ns()
            launch(index)
            times[name].append((time.perf_counter_ns() - start) / 1e3)
        index += 1
        slowest = min(sum(values) for values in times.values())
        if index >= maximum_samples or (index >= minimum_samples and slowest >= minimum_seconds * 1e6):
            break
    return {name: summarise(values, 1) for name, values in times.items()}


def _output_bytes(output: Any) -> int:
    if isinstance(output, (tuple, list)):
        return sum(_output_bytes(part) for part in output)
    return output.numel() * output.element_size() if hasattr(output, "element_size") else 0


def _warm_up(graphs: dict[str, CapturedLaunches], warmup_us: float) -> dict[str, float]:
    """Replays all graphs for about ``warmup_us``. Returns how long each takes, in microseconds."""
    import torch

    for graph in graphs.values():
        graph.replay()
    once_us = {name: _replay_us(graph) for name, graph in graphs.items()}
    for _ in range(min(50, math.floor(warmup_us / sum(once_us.values())))):
        for graph in graphs.values():
            graph.replay()
    torch.cuda.synchronize()
    return once_us


def _replay_us(graph: CapturedLaunches) -> float:
    import torch

    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return max(start.elapsed_time(end) * 1e3, 1.0)


def _median_or_none(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(numpy.median(known)) if known else None
