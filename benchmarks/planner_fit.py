"""Fits the constants of the Hopper planner's models (csrc/plan/sm90_model.h) to measured candidates.

There are two: of launches that overlap with their neighbours, and of those that stand alone. The formula is the
planner's own, through the introspection module. `tune_planner.py fit` is the command.
"""

from __future__ import annotations

import re
import statistics
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy

from marlin_qqq.bench.presets import REFERENCE_SHAPES
from marlin_qqq.bench.results import OURS, Measurement, Run

Model = dict[str, float]

PLANNER_DEVICE = "planner_device"  # where a run's environment holds the device as the planner sees it
REGIMES = ((1, 16), (17, 64), (65, 128), (129, 256), (257, 1024), (1025, 1 << 30))

# What the times' own error weighs beside the loss: without it the fit buys a tenth of a per cent with constants that
# mean nothing, and ranks candidates it has not seen by them. And what drifting from the start costs a constant that no
# measurement depends on.
TIMES_WEIGHT = 0.2
DRIFT_WEIGHT = 1e-4
# What a problem of a reference shape weighs beside one of another shape: those are what people compare kernels on.
REFERENCE_WEIGHT = 3.0
LARGEST_FACTOR = 4.0  # from its start, for any constant
# Times that count are of candidates within this factor of the best one: what an estimate says of others decides
# nothing, and constants need not bend for them.
NEAR = 1.6
# Candidates whose estimates are this close count as nearly tied. The loss of the first one alone is a staircase, on
# which a gradient sees nothing; a much higher temperature rewards estimates that lie apart, not those that are right.
TEMPERATURE = 0.005


@dataclass(frozen=True)
class Setting:
    """How the launches of a sweep are made."""

    label: str
    variant: str  # of our op, before the part that forces a candidate
    constant_weights: bool = True
    standalone: bool = False  # whole layers then, each behind a kernel that lets nothing start early

    @property
    def prefix(self) -> str:
        """Of the measured launches' names, before that of the candidate."""
        return f"{OURS}:{self.variant}tile:"


CONSTANT = Setting("", "constant+")
WITHOUT_PROMISE = Setting("without promise", "", constant_weights=False)
STANDALONE = Setting("standalone", "standalone+", standalone=True)
SETTINGS = (CONSTANT, WITHOUT_PROMISE, STANDALONE)


@dataclass(frozen=True)
class HeaderPart:
    """Where the constants of a model stand in sm90_model.h, and the comment that says where they come from."""

    place: str
    value: re.Pattern[str]
    provenance: re.Pattern[str]

    @classmethod
    def at(cls, place: str, assigned: str) -> HeaderPart:
        return cls(
            place,
            re.compile(rf"^(  {assigned}(\w+) = )([^;]+);$", re.MULTILINE),
            re.compile(rf"^// Fitted on .*\n(?://.*\n)*(?={re.escape(place)})", re.MULTILINE),
        )


HEADER_PARTS = {
    False: HeaderPart.at("struct Sm90Model", "double "),
    True: HeaderPart.at("constexpr Sm90Model standalone_model()", r"model\."),
}


@dataclass
class Problem:
    """One problem of a sweep with the candidates measured on it."""

    sizes: tuple[int, int, int, int]  # num_tokens, out_features, in_features, group_size
    device: Any  # DeviceProperties
    names: list[str]
    plans: list[str]
    times: list[float]
    setting: Setting = CONSTANT

    @property
    def name(self) -> str:
        return problem_name(self.sizes, self.setting)

    @property
    def options(self) -> dict[str, bool]:
        """What the planner is told besides."""
        return {"constant_weights": self.setting.constant_weights, "standalone": self.setting.standalone}


def introspection() -> Any:
    try:
        from marlin_qqq import _introspection
    except ImportError as error:
        raise SystemExit(
            "fit evaluates the planner's formula: it needs the introspection module for this Python "
            f"(python3-dev, then `make build`). measure does not. ({error})"
        ) from None
    return _introspection


def problems_of(run: Run, origin: str) -> list[Problem]:
    """The problems of a saved sweep that have two candidates or more to choose between.

    At the power limit candidates rank otherwise in a burst after a rest than in a row of launches, and neither is
    wrong: a candidate's time there is the geometric mean of both. Of problems timed in a burst alone, those whose
    warpgroups take turns are left out, which lose most in a row.
    """
    if PLANNER_DEVICE not in run.environment:
        raise ValueError(f"{origin} was not saved by `tune_planner.py measure`: its environment has no planner_device")
    device = introspection().DeviceProperties(**run.environment[PLANNER_DEVICE])
    measured: dict[Any, dict[str, list[Measurement]]] = {}
    for m in run.measurements:
        setting = setting_of(m.implementation)
        if m.median_us and setting is not None and m.group_size is not None:
            sizes = (m.num_tokens, m.out_features, m.in_features, m.group_size)
            candidates = measured.setdefault((sizes, setting), {})
            candidates.setdefault(m.implementation.removeprefix(setting.prefix), []).append(m)
    problems = []
    for (sizes, setting), candidates in measured.items():
        limited = introspection().sm90_is_power_limited(*sizes[:3])
        both_ways = limited and any(row.method == "sustained" for rows in candidates.values() for row in rows)
        problem = Problem(sizes, device, [], [], [], setting)
        for name, rows in candidates.items():
            if limited and not both_ways and name.startswith("pingpong"):
                continue
            times = [row.median_us for row in rows if row.median_us and (both_ways or row.method != "sustained")]
            if len(times) == (2 if both_ways else 1):
                problem.names.append(name)
                problem.plans.append(str(rows[0].extra.get("plan", "")))
                problem.times.append(statistics.geometric_mean(times))
        if len(problem.times) > 1:
            problems.append(problem)
    return problems


def setting_of(implementation: str) -> Setting | None:
    """The setting of a measured launch; None: not one of a sweep."""
    return next((setting for setting in SETTINGS if implementation.startswith(setting.prefix)), None)


class Objective:
    """How well a model ranks the measured candidates: a problem a row, its candidates in columns.

    The problems are of one model: all of them stand alone, or none does.
    """

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems: list[Problem] = []
        self.num_gone = self.num_changed = 0  # candidates that the planner has no more, or whose tile has changed
        self.estimator = introspection().Sm90Estimator()
        for problem in problems:
            texts = self.estimator.add(*problem.sizes, problem.device, problem.names, **problem.options)
            kept = [index for index, text in enumerate(texts) if text]
            self.num_gone += len(texts) - len(kept)
            self.num_changed += sum(not _same_launch(problem.plans[index], texts[index]) for index in kept)
            names, plans, times = (
                [values[i] for i in kept] for values in (problem.names, problem.plans, problem.times)
            )
            self.problems.append(Problem(problem.sizes, problem.device, names, plans, times, problem.setting))
        self.problems = [problem for problem in self.problems if problem.names]
        if not self.problems:
            raise ValueError("no measured candidate is one of the planner's: nothing to fit")
        standalone = self.problems[0].setting.standalone
        if any(problem.setting.standalone != standalone for problem in self.problems):
            raise ValueError("problems of both models: each is fitted to its own")
        self.built = introspection().sm90_model(standalone)  # what holds where a model does not say otherwise
        counts = numpy.array([len(problem.names) for problem in self.problems])
        self.filled = numpy.arange(counts.max()) < counts[:, None]
        self.times = self._table([time for problem in self.problems for time in problem.times])
        self.relative_times = self.times / self.times.min(axis=1, keepdims=True)
        self.near = self.filled & (self.relative_times < NEAR)
        self.near_logarithms = numpy.log(self.times[self.near])
        reference = {(shape.out_features, shape.in_features) for shape in REFERENCE_SHAPES}
        self.weights = numpy.array(
            [REFERENCE_WEIGHT if problem.sizes[1:3] in reference else 1.0 for problem in self.problems]
        )
        # Every regime of M weighs the same, with constant weights and without, however many of its problems a sweep of
        # new tiles has added.
        for low, high in REGIMES:
            for setting in SETTINGS:
                rows = self.rows(low, high, setting)
                if rows.any():
                    self.weights[rows] /= self.weights[rows].sum()
        self.evaluations = 0

    @cached_property
    def num_points(self) -> int:
        return int(self.filled.sum())

    def estimates(self, model: Model) -> numpy.ndarray:
        self.evaluations += 1
        return self._table(self.estimator.estimate({**self.built, **model}))

    def losses(self, model: Model) -> numpy.ndarray:
        """For every problem the measured time of the candidate that the model puts first, over the best one's."""
        first = self.estimates(model).argmin(axis=1)
        return self.relative_times[numpy.arange(len(first)), first]

    def weighted_mean(self, values: numpy.ndarray) -> float:
        """Over the problems, by what each weighs."""
        return float(numpy.average(values, weights=self.weights))

    def cost(self, model: Model, temperature: float = TEMPERATURE) -> float:
        """The weighted mean loss, smoothed over near ties, and a little of the times' logarithmic error."""
        estimates = self.estimates(model)
        logarithms = numpy.log(estimates, out=numpy.full_like(estimates, 1e3), where=self.filled)
        weights = numpy.exp((logarithms.min(axis=1, keepdims=True) - logarithms) / temperature)
        weights /= weights.sum(axis=1, keepdims=True)
        losses = (weights * numpy.where(self.filled, self.relative_times, 0.0)).sum(axis=1)
        loss = self.weighted_mean(losses) - 1
        errors = logarithms[self.near] - self.near_logarithms
        return float(loss + TIMES_WEIGHT * (errors**2).mean())

    def errors(self, model: Model) -> numpy.ndarray:
        """The logarithmic errors of the times that count: 0.1 is about ten per cent."""
        return numpy.log(self.estimates(model)[self.near]) - self.near_logarithms

    def time_error(self, model: Model) -> float:
        return float(numpy.sqrt((self.errors(model) ** 2).mean()))

    def unmeasured_choices(self, model: Model) -> list[str]:
        """Problems whose first candidate of all has not been measured: of those the fit promises nothing."""
        measured: dict[Any, set[str]] = {}
        for problem in self.problems:
            measured.setdefault((problem.name, str(problem.device)), set()).update(problem.names)
        found = []
        for problem in self.problems:
            ranked = introspection().sm90_candidates(
                *problem.sizes, problem.device, {**self.built, **model}, **problem.options
            )
            best = ranked[0]
            if best.name not in measured[problem.name, str(problem.device)]:
                found.append(f"{problem.name}: {best.name}")
        return found

    def rows(self, low: int, high: int, setting: Setting | None) -> numpy.ndarray:
        """Which problems have low..high tokens in a setting; None: in all."""
        return numpy.array(
            [low <= p.sizes[0] <= high and setting in (None, p.setting) for p in self.problems], dtype=bool
        )

    def _table(self, values: Sequence[float]) -> numpy.ndarray:
        table = numpy.full(self.filled.shape, numpy.inf)
        table[self.filled] = values
        return table


def problem_name(sizes: tuple[int, int, int, int], setting: Setting) -> str:
    num_tokens, out_features, in_features, group_size = sizes
    mode = "g128" if group_size > 0 else "channel"
    return f"{out_features}x{in_features} M={num_tokens} {mode} {setting.label}".rstrip()


def _same_launch(before: str, now: str) -> bool:
    return not before or before.partition(", estimated")[0] == now.partition(", estimated")[0]


def fit(
    objective: Objective,
    start: Model,
    num_starts: int = 4,
    num_steps: int = 5000,
    seed: int = 0,
    progress: Callable[[str], None] = lambda line: None,
) -> Model:
    """Constants that lower the mean loss, or ``start`` where none are found.

    From ``start``, from what fits the times best, and from points around that, down the gradient of the objective; then
    from the best place along one constant after the other, with the loss hardly smoothed; then ``num_steps`` random
    steps of a few constants, of which those that help are kept.
    """
    from scipy.optimize import least_squares, minimize

    names = list(start)
    origin = numpy.array([start[name] for name in names])
    bound = numpy.log(LARGEST_FACTOR)
    bounds = [(-bound, bound)] * len(names)

    def model_at(x: numpy.ndarray) -> Model:
        return dict(zip(names, (origin * numpy.exp(x)).tolist(), strict=True))

    def cost(x: numpy.ndarray, temperature: float = TEMPERATURE) -> float:
        return objective.cost(model_at(x), temperature) + DRIFT_WEIGHT * float((x**2).mean())

    def errors(x: numpy.ndarray) -> numpy.ndarray:
        return numpy.concatenate([objective.errors(model_at(x)), 0.1 * x])

    zero = numpy.zeros(len(names))
    # A tenth and more off is for the model to know, not for a constant: such errors weigh less than by their square.
    robust = {"loss": "soft_l1", "f_scale": 0.05}
    times_fitted = least_squares(errors, zero, bounds=(-bound, bound), max_nfev=40, **robust).x
    progress(f"times: error {objective.time_error(start):.1%} -> {objective.time_error(model_at(times_fitted)):.1%}")
    random = numpy.random.default_rng(seed)
    starts = [zero, times_fitted]
    starts += [(times_fitted + random.normal(0, 0.2, len(names))).clip(-bound, bound) for _ in range(num_starts - 2)]
    best = min([zero, times_fitted], key=cost)
    for index, x in enumerate(starts[:num_starts]):
        found = minimize(cost, x, method="L-BFGS-B", bounds=bounds, options={"eps": 1e-4}).x
        best = min([best, found], key=cost)
        progress(f"start {index + 1} of {num_starts}: {cost(found):.5f}, {objective.evaluations} evaluations")

    def hardly_smoothed(x: numpy.ndarray) -> float:
        return cost(x, TEMPERATURE / 5)

    options = {"maxiter": 3, "xtol": 1e-3, "ftol": 1e-6}
    found = minimize(hardly_smoothed, best, method="Powell", bounds=bounds, options=options).x
    best = min([best, found], key=hardly_smoothed)
    least = hardly_smoothed(best)
    for _ in range(num_steps):
        x = best.copy()
        chosen = random.choice(len(names), size=random.integers(1, 4), replace=False)
        x[chosen] += random.normal(0, random.choice([0.01, 0.03, 0.1]), len(chosen))
        x = x.clip(-bound, bound)
        if (value := hardly_smoothed(x)) < least:
            best, least = x, value
    progress(f"steps: {least:.5f}, {objective.evaluations} evaluations")
    fitted = {name: float(f"{value:.4g}") for name, value in model_at(best).items()}
    return min([fitted, dict(start)], key=lambda model: objective.weighted_mean(objective.losses(model)))


def report(objective: Objective, before: Model, after: Model) -> list[str]:
    """Mean and worst loss a regime of M, before and after."""
    old, new = objective.losses(before), objective.losses(after)
    lines = [f"{'M':>10} {'problems':>8}   {'before: mean':>12} {'worst':>7}   {'after: mean':>12} {'worst':>7}"]
    regimes = [(low, high, setting) for setting in SETTINGS for low, high in REGIMES]
    for low, high, setting in (*regimes, (1, 1 << 30, None)):
        rows = objective.rows(low, high, setting)
        if not rows.any():
            continue
        name = "all" if setting is None else f"{low}-{high}" if high < 1 << 30 else f"{low}-"
        name += " raw" if setting is WITHOUT_PROMISE else ""
        figures = [figure for losses in (old[rows], new[rows]) for figure in (losses.mean(), losses.max())]
        lines.append("{:>10} {:>8}   {:>12.4f} {:>7.3f}   {:>12.4f} {:>7.3f}".format(name, int(rows.sum()), *figures))
    for title, model, losses in (("before", before, old), ("after", after, new)):
        worst = int(losses.argmax())
        lines.append(
            f"worst {title}: {objective.problems[worst].name}; error of the times {objective.time_error(model):.1%}"
        )
    return lines


def header_values(text: str, standalone: bool = False) -> Model:
    """The constants' values in the text of sm90_model.h; of the second model those that it has of its own."""
    return {name: float(value) for _, name, value in HEADER_PARTS[standalone].value.findall(text)}


def rewritten_header(text: str, model: Model, provenance: str, standalone: bool = False) -> str:
    """The header with a model's values and the line that says where they come from."""
    part = HEADER_PARTS[standalone]
    if header_values(text, standalone).keys() != model.keys():
        differing = ", ".join(sorted(header_values(text, standalone).keys() ^ model.keys()))
        raise ValueError(f"the header and the built model differ in {differing}")
    if len(part.provenance.findall(text)) != 1:
        raise ValueError(f'the header must have one comment "// Fitted on ..." right above {part.place}')
    comment = textwrap.fill(f"Fitted on {provenance}.", 120, initial_indent="// ", subsequent_indent="// ")
    text = part.provenance.sub(lambda _: f"{comment}\n", text)
    return part.value.sub(lambda match: f"{match[1]}{_number(model[match[2]])};", text)


def _number(value: float) -> str:
    return re.sub(r"e\+0*", "e", f"{value:.6g}")


def provenance(runs: Sequence[tuple[Path, Run]], objective: Objective, model: Model) -> str:
    """On which GPUs, on how many candidates, and how well."""
    gpus = dict.fromkeys(str(run.environment.get("gpu", {}).get("name", "an unnamed GPU")) for _, run in runs)
    return (
        f"{' and '.join(gpus)}: {len(objective.problems):,} problems, {objective.num_points:,} candidates, "
        f"mean loss {objective.losses(model).mean() - 1:.1%}"
    )
