"""Runs one benchmark: checks every implementation on every problem, then times the right ones together."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING

from marlin_qqq.bench import ceilings as ceilings_module
from marlin_qqq.bench import environment as environment_module
from marlin_qqq.bench import timing
from marlin_qqq.bench.implementations import Bound, Context, Implementation, Unavailable
from marlin_qqq.bench.inputs import ACTIVATION_COPIES, make_activations
from marlin_qqq.bench.presets import Layer
from marlin_qqq.bench.problem import PER_CHANNEL, Ceilings, GemmProblem
from marlin_qqq.bench.results import OURS, Measurement, Run

if TYPE_CHECKING:
    import torch

Progress = Callable[[str], None]
METHODS = ("graph", "sustained")
MAXIMUM_INPUT_COPIES = 64


@dataclass
class Settings:
    """How to measure. ``methods`` counts on a GPU only; a CPU run is timed by the wall clock."""

    device: str = "cuda"
    dtype: str = "float16"
    methods: Sequence[str] = ("graph",)
    replays: int = 15
    sustained_rounds: int = 2
    cpu_seconds: float = 0.2
    with_bias: bool = False
    seed: int = 0
    sustained_implementations: Sequence[str] | None = None  # None: all
    notes: list[str] = field(default_factory=list)

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    def torch_dtype(self) -> torch.dtype:
        import torch

        return {"float16": torch.float16, "bfloat16": torch.bfloat16}[self.dtype]


class Runner:
    """Holds what all problems of a run share: context, ceilings, the growing :class:`Run`."""

    def __init__(self, settings: Settings, progress: Progress = lambda message: None) -> None:
        self.settings = settings
        self.progress = progress
        if settings.on_gpu:
            import torch

            torch.cuda.set_device(settings.device)
        self.run = Run(
            environment=environment_module.describe_environment(settings.device),
            settings=asdict(settings),
        )
        progress("measuring the device's ceilings")
        self.ceilings: Ceilings
        self.ceilings, self.run.ceilings = ceilings_module.measure_ceilings(settings.device)
        self.context = self.new_context()
        self.clocks = environment_module.ClockSampler(int(settings.device.partition(":")[2] or 0))

    def new_context(self) -> Context:
        settings = self.settings
        l2_bytes = environment_module.l2_bytes(settings.device)
        return Context(settings.device, settings.torch_dtype(), l2_bytes, settings.seed, settings.with_bias)

    def products(
        self,
        layers: Sequence[Layer],
        num_tokens: Sequence[int],
        implementations: Sequence[Implementation],
        operation: str = "gemm",
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Measures every implementation on every layer and batch into ``self.run``, problem by problem.

        ``should_stop`` is asked before every problem; what is left then is named in the run's notes.
        """
        group_size = next((i.group_size for i in implementations if i.group_size is not None), PER_CHANNEL)
        for layer in layers:
            problem = GemmProblem(1, layer.out_features, layer.in_features, group_size, layer.name)
            if should_stop():
                self.run.notes.append(f"not run: {operation} {layer.shape}, out of time")
                continue
            with self._loaded(implementations, problem) as loaded:
                for tokens in num_tokens:
                    if should_stop():
                        self.run.notes.append(f"not run: {operation} {layer.shape} M={tokens}, out of time")
                        continue
                    self.progress(f"{operation} {layer.shape} M={tokens}")
                    self._cell(
                        operation,
                        replace(problem, num_tokens=tokens),
                        implementations,
                        loaded,
                        self.context.copies(problem.packed_weight_bytes),
                        ACTIVATION_COPIES,
                    )

    def quantize(
        self, num_tokens: Sequence[int], in_features: Sequence[int], implementations: Sequence[Implementation]
    ) -> None:
        """Measures quantize_per_token's implementations on every size. The inputs rotate, up to 64 copies."""
        for features in in_features:
            problem = GemmProblem(1, 0, features)
            with self._loaded(implementations, problem) as loaded:
                for tokens in num_tokens:
                    self.progress(f"quantize M={tokens} K={features}")
                    copies = min(MAXIMUM_INPUT_COPIES, self.context.copies(2 * tokens * features))
                    self._cell("quantize", replace(problem, num_tokens=tokens), implementations, loaded, copies, copies)

    @contextlib.contextmanager
    def _loaded(
        self, implementations: Sequence[Implementation], problem: GemmProblem
    ) -> Iterator[dict[int, Implementation | str]]:
        """Loads the weights of one shape into all implementations; those that cannot are reasons instead."""
        loaded: dict[int, Implementation | str] = {}
        try:
            for implementation in implementations:
                try:
                    implementation.available(self.context)
                    implementation.load(problem, self.context)
                    loaded[id(implementation)] = implementation
                except Unavailable as reason:
                    loaded[id(implementation)] = str(reason)
            yield loaded
        finally:
            for implementation in implementations:
                implementation.unload()
            self.context.forget_shape()

    def _cell(
        self,
        operation: str,
        problem: GemmProblem,
        implementations: Sequence[Implementation],
        loaded: dict[int, Implementation | str],
        copies: int,
        activation_copies: int,
    ) -> None:
        """One problem: bind, check, time together, record."""
        context = self.context
        activations = make_activations(
            problem.num_tokens,
            problem.in_features,
            context.dtype,
            context.device,
            context.generator,
            activation_copies,
        )
        candidates: list[tuple[Implementation, Bound | str]] = []
        for implementation in implementations:
            entry = loaded[id(implementation)]
            if isinstance(entry, str):
                candidates.append((implementation, entry))
                continue
            try:
                candidates.append((implementation, entry.bind(problem, activations, context)))
            except Unavailable as reason:
                candidates.append((implementation, str(reason)))
            except RuntimeError as error:  # a launch that fails is a result, too; the others go on
                candidates.append((implementation, failure(implementation.name, error)))

        measurements = []
        bound: list[tuple[Measurement, Bound]] = []
        for implementation, candidate in candidates:
            measurement = Measurement(
                operation=operation,
                implementation=implementation.name,
                num_tokens=problem.num_tokens,
                out_features=problem.out_features,
                in_features=problem.in_features,
                group_size=implementation.group_size,
                label=problem.label,
                method=self.settings.methods[0] if self.settings.on_gpu else "wall",
            )
            measurements.append(measurement)
            if isinstance(candidate, str):
                refuse(measurement, candidate)
            else:
                bound.append((measurement, candidate))
        self.record(measurements + self.measure(bound, copies))
        context.forget_batch()

    def measure(self, bound: Sequence[tuple[Measurement, Bound]], copies: int) -> list[Measurement]:
        """Checks ``bound``, times those that are right together, and fills their measurements.

        The first method's numbers go into the measurements given; each further method makes new ones, returned.
        """
        right: list[tuple[Measurement, Bound]] = []
        for measurement, candidate in bound:
            measurement.bytes_moved = candidate.bytes_moved
            measurement.operations = candidate.operations
            measurement.floor_us = self.ceilings.floor_us(candidate.bytes_moved, candidate.operations)
            measurement.extra = candidate.extra
            measurement.check = candidate.check(candidate.launch(0))
            if not measurement.wrong:
                right.append((measurement, candidate))
        if self.settings.on_gpu:
            return self._measure_on_gpu(right, copies)
        samples = timing.time_on_cpu(
            {str(index): candidate.launch for index, (_, candidate) in enumerate(right)}, self.settings.cpu_seconds
        )
        for index, (measurement, _) in enumerate(right):
            _fill(measurement, samples[str(index)])
        return []

    def _measure_on_gpu(self, right: Sequence[tuple[Measurement, Bound]], copies: int) -> list[Measurement]:
        graphs: dict[str, timing.CapturedLaunches] = {}
        captured: list[tuple[Measurement, Bound]] = []
        for measurement, candidate in right:
            launches = timing.num_launches(copies, measurement.floor_us or 10.0)
            try:
                graphs[str(len(graphs))] = timing.CapturedLaunches(candidate.launch, launches)
            except RuntimeError as error:
                refuse(measurement, failure(measurement.implementation, error))
                continue
            captured.append((measurement, candidate))
        right = captured

        added: list[Measurement] = []
        for position, method in enumerate(self.settings.methods):
            if method == "sustained":
                wanted = self.settings.sustained_implementations
                names = [
                    name
                    for name, (measurement, _) in zip(graphs, right, strict=True)
                    if wanted is None or measurement.implementation in wanted
                ]
                chosen = {name: graphs[name] for name in names}
                samples = timing.time_graphs_sustained(chosen, self.settings.sustained_rounds, self.clocks)
            else:
                samples = timing.time_graphs(graphs, self.settings.replays)
            for name, (measurement, _) in zip(graphs, right, strict=True):
                if name not in samples:
                    continue
                target = measurement if position == 0 else _copy_for_method(measurement)
                target.method = method
                _fill(target, samples[name])
                if position:
                    added.append(target)
        # What the timed graphs left behind must still be right: it is the timed state that counts.
        for name, (measurement, candidate) in zip(graphs, right, strict=True):
            self._check_after(graphs[name], measurement, candidate, added)
        return added

    def _check_after(
        self,
        graph: timing.CapturedLaunches,
        measurement: Measurement,
        candidate: Bound,
        added: Sequence[Measurement],
    ) -> None:
        import torch

        verdict = candidate.check(graph.first_output)
        if candidate.exact and isinstance(graph.last_output, torch.Tensor) and not verdict.startswith("WRONG"):
            for index, output in ((0, graph.first_output), (graph.launches - 1, graph.last_output)):
                if not torch.equal(output, candidate.launch(index)):
                    verdict = f"WRONG: launch {index} of the graph differs from the same call outside it"
        if not verdict.startswith("WRONG"):
            return
        for target in (measurement, *added):
            if (target.implementation, target.group_size) == (measurement.implementation, measurement.group_size):
                target.check = f"{verdict} (after the timed replays)"
                target.median_us = target.p10_us = target.p90_us = None

    def record(self, measurements: Sequence[Measurement]) -> None:
        self.run.measurements.extend(measurements)


def failure(implementation: str, error: BaseException) -> str:
    """A failed launch in one line: a wrong result where it is ours, an unavailable baseline otherwise."""
    first_line = (str(error).strip().splitlines() or [""])[0][:200]
    prefix = "WRONG: failed, " if implementation.startswith(OURS) else ""
    return f"{prefix}{type(error).__name__}: {first_line}"


def refuse(measurement: Measurement, reason: str) -> None:
    """Notes why there is no speed to show."""
    if reason.startswith("WRONG"):
        measurement.check = reason
    else:
        measurement.unavailable = reason


def _fill(measurement: Measurement, sample: timing.Sample) -> None:
    for name, value in asdict(sample).items():
        setattr(measurement, name, value)


def _copy_for_method(measurement: Measurement) -> Measurement:
    return replace(measurement, extra=dict(measurement.extra), sm_clock_mhz=None, power_w=None)
