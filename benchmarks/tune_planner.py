"""Regenerates the Hopper planner's constants (csrc/plan/sm90_model.h) for the GPU at hand, in two steps.

    python benchmarks/tune_planner.py measure --json sweep.json       # on the GPU; about twenty minutes
    python benchmarks/tune_planner.py fit sweep.json --write          # anywhere; about as long; then build again

`measure` times the planner's best candidates, and one of each kind of tile, for a grid of shapes and batch sizes in
both modes, launched with constant weights, or, with --without-promise, as the op is by default; the fit takes both.
With --standalone it times whole layers, each behind a kernel that lets nothing start early, as models run them: their
launches have constants of their own. Products at the power limit need --sustained: they are timed in a burst after a
rest and in a row of launches, and the fit takes the middle of both. It needs the CUDA library, not the introspection
module, so any Python will do. A sweep that was cut short by its budget is continued by the same command.

`fit` evaluates the planner's own formula, for which it needs the introspection module of this Python. It prints the
loss (the time of the candidate ranked first over the fastest one's) before and after. Where it says that a problem's
new first choice was not measured, build with the new constants, measure into a second file, and fit both.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import planner_fit

from marlin_qqq._devices import check_device
from marlin_qqq._files import write_text_atomically
from marlin_qqq.bench.check import Reference
from marlin_qqq.bench.implementations import Context, Implementation
from marlin_qqq.bench.implementations.layers import MarlinLinear
from marlin_qqq.bench.implementations.marlin import MarlinGemm
from marlin_qqq.bench.implementations.served import KernelBetween, Served
from marlin_qqq.bench.presets import REFERENCE_SHAPES, Layer, parse_integers, parse_shape
from marlin_qqq.bench.results import Measurement, Run, load_run
from marlin_qqq.bench.runner import Runner, Settings
from marlin_qqq.bench.tune import Candidate, ask_candidates

HEADER = Path(__file__).resolve().parents[1] / "csrc" / "plan" / "sm90_model.h"
# Besides the reference shapes: projections of models from 0.5B to 70B, whole and as ranks have them, and a few that are
# nobody's. A fit to nine shapes lost 0.7 % on those and 4.6 % on the next twenty: the number of shapes is what counts.
SHAPES = ",".join(shape.shape for shape in REFERENCE_SHAPES) + (
    ",6144x4096,10240x8192,1280x8192,8192x3584,4608x3584,3584x3584,3584x18944,37888x3584,7168x5120,5120x5120"
    ",27648x5120,5120x13824,6144x2560,2560x9728,2560x2560,8192x1024,1024x8192,2048x2048,16384x2048,2048x8192"
    ",8192x2048,2560x8192,14336x8192,896x4864,12288x12288,5120x4096,24576x4096,4096x12288,3072x8192,8192x7168"
    ",1536x8960,5632x2048,4096x11008,13824x5120,18944x3584,2048x4096,512x6144,10240x5120,1024x2048"
    ",16384x3072,22016x2048,18432x2304,17920x1536,11264x2048,12288x1536,2048x11008,2304x9216,12288x4096,22016x4096"
    ",11008x4096,4096x22016"
)
TOKENS = "1,4,16,24,32,48,64,80,96,128,160,192,256,320,512,1024,4096"
OVERRIDES = (
    "MARLIN_QQQ_FAMILY",
    "MARLIN_QQQ_TILE",
    "MARLIN_QQQ_SPLIT",
    "MARLIN_QQQ_CANDIDATE",
    "MARLIN_QQQ_STANDALONE",
)
# The best candidates of a problem often are one tile with a row of splits, which teach little beyond each other.
MOST_OF_A_TILE = 3
MOST_QUANTIZING = 3
SECONDS_BETWEEN_SAVES = 15.0

Work = tuple[Layer, int, int]  # shape, group_size, num_tokens


def choose_candidates(
    candidates: Sequence[Candidate], num_tokens: int, limit: int, sharing: bool = False
) -> list[Candidate]:
    """The ``limit`` best of a problem's candidates, which come best first, and one of every family of tiles.

    That one is the best of the family's tile that wastes the fewest tokens: a model that ranks a family wrong must be
    found out. Of those that quantise their activations the best few come besides, and with ``sharing`` the best of each
    family whose blocks share activations in pairs. What is chosen keeps its order: the planner's own choice is first.
    """
    quantizing = [candidate for candidate in candidates if candidate.quantizes]
    plain = [candidate for candidate in candidates if not candidate.quantizes]
    best: list[Candidate] = []
    for candidate in plain:
        same_tile = sum(other.tile_name == candidate.tile_name for other in best)
        if len(best) < limit and same_tile < MOST_OF_A_TILE:
            best.append(candidate)
    families: dict[str, list[Candidate]] = {}
    for candidate in plain:
        families.setdefault(candidate.family, []).append(candidate)
    suitable = [
        min(family, key=lambda c: (-(-num_tokens // c.tile_tokens) * c.tile_tokens, -c.tile_tokens))
        for family in families.values()
        if num_tokens <= 4 * max(candidate.tile_tokens for candidate in family)  # else one for few tokens
    ]
    chosen = {*best, *suitable, *quantizing[:MOST_QUANTIZING]}
    if sharing:
        for family in families.values():
            chosen.update([candidate for candidate in family if candidate.multicast == 2][:1])
    return [candidate for candidate in candidates if candidate in chosen]


def random_shapes(count: int, seed: int = 0) -> list[Layer]:
    """Layers of sizes that are nobody's, 0.75 to 110 MB of packed weights, always the same.

    On such layers constants are put to the test: fitted to layers of models, they ranked candidates of the like within
    0.7 %, and of 70 of these, where other constants would have chosen otherwise, 3 % too slow.
    """
    generator = random.Random(seed)
    shapes: dict[str, Layer] = {}
    while len(shapes) < count:
        out_features = 64 * round(math.exp(generator.uniform(math.log(8), math.log(500))))
        in_features = 128 * round(math.exp(generator.uniform(math.log(8), math.log(170))))
        if 1.5e6 < out_features * in_features < 2.2e8:
            shape = parse_shape(f"{out_features}x{in_features}")
            shapes[shape.shape] = shape
    return list(shapes.values())


def work_list(shapes: Sequence[Layer], num_tokens: Sequence[int], group_sizes: Sequence[int]) -> list[Work]:
    """Every problem, always in the same random order: a sweep that is cut short should cover the grid."""
    work = [(shape, mode, tokens) for shape in shapes for mode in group_sizes for tokens in num_tokens]
    random.Random(0).shuffle(work)
    return work


class OwnChoice(Reference):
    """What every candidate's output must equal to the bit: that of the planner's own choice, on the GPU."""

    def __init__(self, output: Any) -> None:
        super().__init__([], "planner's own choice, every value")
        self.output = output

    def compare(self, output: Any) -> str:
        import torch

        if torch.equal(output, self.output):
            return f"exact ({self.description})"
        return f"WRONG: {int((output != self.output).sum())} values differ from the {self.description}"


class SweepContext(Context):
    def reference(self, problem: Any, activations: Any, dtype: Any = None, bias: Any = None) -> Reference:
        key = id(activations)
        if key not in self._references:
            import torch

            import marlin_qqq

            weights = self.packed_weights(problem)
            output = torch.ops.marlin_qqq.marlin_qqq_gemm(
                activations.quantized[0].to(self.device),  # a layer quantises its reference on the CPU
                weights.packed[0],
                activations.token_scale[0].to(self.device),
                weights.channel_scale[0],
                weights.group_scale[0],
                marlin_qqq.make_workspace(problem.out_features, self.device),
                problem.num_tokens,
                problem.out_features,
                problem.in_features,
                bias=bias,
                out_dtype=dtype or self.dtype,
            )
            self._references[key] = (activations, OwnChoice(output))
        return self._references[key][1]


class SweepRunner(Runner):
    def new_context(self) -> Context:
        context = super().new_context()
        return SweepContext(context.device, context.dtype, context.l2_bytes, self.settings.seed)


class Sweep:
    """The growing file of one sweep on one GPU."""

    def __init__(self, runner: Runner, path: Path, setting: planner_fit.Setting = planner_fit.CONSTANT) -> None:
        self.runner, self.path, self.setting = runner, path, setting
        self.done: set[tuple[int, int, int, int]] = set()
        self.num_before = 0
        self._saved = time.monotonic()
        if path.exists():
            before = load_run(path)
            self.num_before = len(before.measurements)
            runner.run.measurements = before.measurements
            self.device = before.environment.get(planner_fit.PLANNER_DEVICE)
            self.done = {
                (m.num_tokens, m.out_features, m.in_features, m.group_size or -1)
                for m in before.measurements
                if planner_fit.setting_of(m.implementation) == setting
            }

    def measure(self, work: Work, limit: int, longest_us: float = math.inf) -> str:
        """One problem: what came of it, in a line. One that is estimated to take longer is left out."""
        shape, mode, tokens = work
        sizes = (tokens, shape.out_features, shape.in_features, mode)
        if sizes in self.done:
            return "measured before"
        device, candidates = ask_candidates(
            *sizes,
            self.runner.settings.device,
            constant_weights=self.setting.constant_weights,
            standalone=self.setting.standalone,
        )
        known = self.runner.run.environment.setdefault(planner_fit.PLANNER_DEVICE, device)
        if self.num_before and self.device != known:
            raise ValueError(f"{self.path} was measured on another GPU than this one; give another --json")
        if candidates[0].estimated_us > longest_us:
            return f"left out, would take {candidates[0].estimated_us:.0f} us"
        sustained = "sustained" in self.runner.settings.methods
        chosen = choose_candidates(candidates, tokens, limit, sharing=sustained)
        random.shuffle(chosen)  # what is timed first in a row of launches has another clock
        first = len(self.runner.run.measurements)
        implementations = [self.implementation(candidate, mode) for candidate in chosen]
        by_name = {timed.name: candidate for timed, candidate in zip(implementations, chosen, strict=True)}
        if self.setting.standalone:
            implementations.append(KernelBetween())
        self.runner.products([shape], [tokens], implementations)
        if self.setting.standalone:
            _subtract(self.runner.run.measurements.pop(), self.runner.run.measurements[first:])
        rows = self.runner.run.measurements[first:]
        for row in rows:
            row.extra = {"plan": by_name[row.implementation].text}
        self.done.add(sizes)
        self.save(SECONDS_BETWEEN_SAVES)
        return "; ".join(
            self.summary([row for row in rows if row.method == method], by_name, candidates[0])
            for method in dict.fromkeys(row.method for row in rows)
        )

    def summary(self, rows: Sequence[Measurement], by_name: dict[str, Candidate], own: Candidate) -> str:
        """What came of one problem's candidates, timed in one way."""
        timed = {by_name[row.implementation]: row.median_us for row in rows if row.median_us}
        if own not in timed:
            return "; ".join({row.check if row.wrong else row.unavailable for row in rows if not row.median_us})
        best = min(timed, key=lambda candidate: timed[candidate])
        return f"own choice {timed[own]:.2f} us, best {timed[best]:.2f} us ({best.name}) of {len(timed)}"

    def implementation(self, candidate: Candidate, group_size: int) -> Implementation:
        """What times one candidate in the sweep's setting."""
        variant = self.setting.variant + candidate.variant
        if not self.setting.standalone:
            return MarlinGemm(variant, group_size)
        layer = Served(MarlinLinear(group_size, variant))
        layer.name = self.setting.prefix + candidate.name
        return layer

    def save(self, seconds: float = 0.0) -> None:
        """Writes the whole file, unless it was written in the last ``seconds``: a large one takes a while."""
        if time.monotonic() - self._saved >= seconds:
            write_text_atomically(self.path, self.runner.run.to_json())
            self._saved = time.monotonic()


def _subtract(between: Measurement, rows: Sequence[Measurement]) -> None:
    """Takes the time of the kernel before a layer from that of both."""
    for row in rows:
        if row.median_us and row.p10_us and row.p90_us and between.median_us:
            row.median_us -= between.median_us
            row.p10_us -= between.median_us
            row.p90_us -= between.median_us


def measure(arguments: argparse.Namespace) -> int:
    import torch

    start = time.monotonic()
    if set_by_user := [name for name in OVERRIDES if os.environ.get(name)]:
        raise ValueError(f"{', '.join(set_by_user)} would decide in the planner's place; unset it")
    device = check_device(arguments.device)
    if not device.startswith("cuda") or torch.cuda.get_device_capability(device) != (9, 0):
        raise ValueError("measure needs a Hopper GPU: only their planner has a model to fit (csrc/plan/sm90_model.h)")
    if arguments.sustained and arguments.setting.standalone:
        raise ValueError("--sustained is for launches in a row: not with --standalone")
    shapes = random_shapes(arguments.random_shapes) or [parse_shape(text) for text in arguments.shapes.split(",")]
    todo = work_list(shapes, parse_integers(arguments.num_tokens), [int(g) for g in arguments.group_size.split(",")])
    methods = ("graph", "sustained") if arguments.sustained else ("graph",)
    runner = SweepRunner(Settings(device=device, replays=arguments.replays, methods=methods))
    sweep = Sweep(runner, arguments.json, arguments.setting)
    try:
        for index, work in enumerate(todo):
            seconds = time.monotonic() - start
            if seconds > arguments.budget:
                print(f"out of time: {len(todo) - index} of {len(todo)} problems left; the same command goes on")
                break
            line = sweep.measure(work, arguments.candidates, arguments.longest_us)
            shape, mode, tokens = work
            sizes = (tokens, shape.out_features, shape.in_features, mode)
            name = planner_fit.problem_name(sizes, sweep.setting)
            print(f"[{index + 1:4}/{len(todo)} {seconds:4.0f} s] {name}: {line}", flush=True)
    finally:
        sweep.save()
    run = sweep.runner.run
    print(
        f"{len(run.measurements)} candidates of {len(sweep.done)} problems in {arguments.json}; {run.num_wrong} wrong"
    )
    return 1 if run.num_wrong else 0


def fit(arguments: argparse.Namespace) -> int:
    runs = [(path, load_run(path)) for path in arguments.sweeps]
    problems = [problem for path, run in runs for problem in planner_fit.problems_of(run, str(path))]
    overlapping = [problem for problem in problems if not problem.setting.standalone]
    standing_alone = [problem for problem in problems if problem.setting.standalone]
    if overlapping or not standing_alone:
        fit_model(arguments, runs, overlapping, standalone=False)
    if standing_alone:
        fit_model(arguments, runs, standing_alone, standalone=True)
    return 0


def fit_model(
    arguments: argparse.Namespace,
    runs: Sequence[tuple[Path, Run]],
    problems: Sequence[planner_fit.Problem],
    standalone: bool,
) -> None:
    """Fits one of the two models to its problems and prints what comes of it."""
    objective = planner_fit.Objective(problems)
    before = planner_fit.header_values(HEADER.read_text(), standalone)
    built = planner_fit.introspection().sm90_model(standalone)
    if before != {name: built[name] for name in before}:
        raise ValueError(f"{HEADER.name} has other constants than the built planner: build first")
    print(f"{len(objective.problems)} problems, {objective.num_points} candidates")
    if objective.num_gone:
        print(f"left out, for the planner has them no more: {objective.num_gone} candidates")
    if objective.num_changed:
        print(f"beware: {objective.num_changed} candidates are launched otherwise than when they were measured")
    after = planner_fit.fit(
        objective, before, arguments.starts, arguments.steps, progress=lambda line: print(line, flush=True)
    )
    for name, value in after.items():
        print(f"{name:28} {before[name]:>10.4g} -> {value:.4g}")
    print("\n".join(planner_fit.report(objective, before, after)))
    unmeasured = objective.unmeasured_choices(after)
    print(f"{len(unmeasured)} problems whose new first choice was not measured{':' if unmeasured else ''}")
    for line in unmeasured[:10]:
        print(f"  {line}")
    if arguments.write:
        origin = planner_fit.provenance(runs, objective, after)
        write_text_atomically(HEADER, planner_fit.rewritten_header(HEADER.read_text(), after, origin, standalone))
        print(f"wrote {HEADER.name}; build again (make build)")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    step = commands.add_parser("measure", help="time candidates on this GPU (needs no introspection module)")
    step.add_argument("--json", type=Path, default=Path("sweep.json"), help="where to save; a file there is continued")
    step.add_argument("--budget", type=float, default=540.0, help="seconds after which no new problem is started")
    step.add_argument("--shapes", default=SHAPES, help="NxK,NxK,...")
    step.add_argument(
        "--random-shapes", type=int, default=0, metavar="COUNT", help="layers of random sizes instead, always the same"
    )
    step.add_argument("--num-tokens", default=TOKENS, help="batch sizes")
    step.add_argument("--group-size", default="-1,128", help="modes")
    step.add_argument(
        "--candidates", type=int, default=8, help="the planner's best to time; of other families one more"
    )
    step.add_argument(
        "--longest-us", type=float, default=math.inf, metavar="US", help="leave out problems estimated to take longer"
    )
    step.add_argument(
        "--sustained", action="store_true", help="time a row of launches, too: for products at the power limit"
    )
    settings = step.add_mutually_exclusive_group()
    settings.add_argument(
        "--without-promise", dest="setting", action="store_const", const=planner_fit.WITHOUT_PROMISE,
        help="launches without constant_weights (a file may hold all settings)",
    )  # fmt: skip
    settings.add_argument(
        "--standalone", dest="setting", action="store_const", const=planner_fit.STANDALONE,
        help="layers behind a kernel that lets nothing start early",
    )  # fmt: skip
    step.set_defaults(setting=planner_fit.CONSTANT)
    step.add_argument("--replays", type=int, default=9)
    step.add_argument("--device", default="cuda")
    step.set_defaults(run=measure)
    step = commands.add_parser("fit", help="fit the constants to sweeps (needs the introspection module and scipy)")
    step.add_argument("sweeps", type=Path, nargs="+", metavar="SWEEP.json")
    step.add_argument("--starts", type=int, default=4, help="places to search from")
    step.add_argument("--steps", type=int, default=5000, help="random steps from the best place found")
    step.add_argument("--write", action="store_true", help=f"rewrite csrc/plan/{HEADER.name}")
    step.set_defaults(run=fit)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        return options.run(options)
    except ValueError as error:
        print(f"tune_planner: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
