"""The whole comparison that the Hopper kernels are judged by, in one run on one GPU, in about four minutes.

    python benchmarks/run_hopper.py --json benchmarks/results/hopper.json

Parts, in this order: quantize_per_token; the product on the reference shapes over M, against Humming, fp8, fp16, int_mm
and our own sm_80 kernels; 400 launches back to back for large M; bias and bf16; quantise + product as a layer runs it;
the linears of a decoder layer behind other kernels, as a model serves them.
Humming joins in when `humming-kernels` can be imported (a folder on PYTHONPATH will do); its kernels compile while the
first part runs. The file is written after every part; a run that reaches --budget leaves the rest out and says what.
In a copy of the repository without .git, MARLIN_QQQ_COMMIT names the commit. The last lines printed are a short table
and the goals (benchmarks/goals.py).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from goals import judge, time_of

from marlin_qqq._devices import check_device
from marlin_qqq._files import write_text_atomically
from marlin_qqq.bench.implementations import gemm_implementations
from marlin_qqq.bench.implementations.layers import decoder_layer, decoder_layer_implementations, linear_implementations
from marlin_qqq.bench.implementations.marlin import MarlinGemm
from marlin_qqq.bench.implementations.quantize import quantize_implementations
from marlin_qqq.bench.presets import REFERENCE_SHAPES, Layer, model_layers, parse_integers, parse_shape
from marlin_qqq.bench.results import OURS, Measurement, Run
from marlin_qqq.bench.runner import Runner, Settings
from marlin_qqq.bench.tables import footnotes

GROUPS = (-1, 128)
TOKENS = "1,16,17,32,33,64,65,96,128,129,192,193,256,257,320,384,512,1024,4096,8192"
SUSTAINED_TOKENS = (1024, 4096)
EXTRA_TOKENS = (1, 64, 256, 1024)
SERVED = "served"
SERVED_MODEL = "llama-3.1-8b"
SERVED_TOKENS = (1, 4, 16, 64, 256)
QUANTIZE_SIZES = ((1, 4096), (16, 4096), (64, 8192), (256, 28672), (1024, 4096), (4096, 8192), (16384, 8192))
SHOWN_TOKENS = (1, 16, 32, 64, 128, 256, 1024, 4096)
# Column heads and (implementation, group size) of the short table.
SHORT_COLUMNS = (
    ("read", ("read", -1)),
    ("chain", ("chain", -1)),
    ("chain g", ("chain", 128)),
    ("chn", (OURS, -1)),
    ("chn+c", (f"{OURS}:constant", -1)),
    ("g128", (OURS, 128)),
    ("g128+c", (f"{OURS}:constant", 128)),
    ("sm80", (f"{OURS}:sm80", -1)),
    ("sm80g", (f"{OURS}:sm80", 128)),
    ("hum", ("humming", -1)),
    ("hum g", ("humming", 128)),
    ("int_mm", ("int_mm", None)),
    ("fp8", ("fp8", None)),
    ("fp16", ("fp16", None)),
)


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--json", type=Path, default=Path("benchmarks/results/hopper.json"), help="where to save the run"
    )
    parser.add_argument("--budget", type=float, default=240.0, help="seconds after which no new problem is started")
    parser.add_argument("--shapes", default=",".join(shape.name for shape in REFERENCE_SHAPES), help="NxK,NxK,...")
    parser.add_argument("--num-tokens", default=TOKENS, help="batch sizes of the main part")
    parser.add_argument("--variants", default="default,constant,sm80", help="variants of our op in the main part")
    parser.add_argument("--baselines", default="read,chain,humming,fp8,fp16,int_mm")
    parser.add_argument("--replays", type=int, default=7)
    parser.add_argument("--parts", default="quantize,gemm,sustained,extras,linear,served", help="which parts to run")
    parser.add_argument("--device", default="cuda", help="cuda; cpu only tries the script out")
    return parser.parse_args(words)


class Session:
    """The run with its clock: parts ask it whether to stop and save through it."""

    def __init__(self, arguments: argparse.Namespace, settings: Settings) -> None:
        self.start = time.monotonic()
        self.arguments = arguments
        self.runner = Runner(settings)
        self.part = ""

    def seconds(self) -> float:
        return time.monotonic() - self.start

    def out_of_time(self) -> bool:
        return self.seconds() > self.arguments.budget

    def finish_part(self, name: str) -> None:
        write_text_atomically(self.arguments.json, self.runner.run.to_json())
        print(f"[{self.seconds():5.0f} s] {name}: {len(self.runner.run.measurements)} measurements so far", flush=True)


def main() -> int:
    arguments = parse_arguments()
    arguments.json = arguments.json.resolve()
    device = check_device(arguments.device)
    parts = set(arguments.parts.split(","))
    shapes = [parse_shape(text) for text in arguments.shapes.split(",")]
    tokens = parse_integers(arguments.num_tokens)
    baselines = [name for name in arguments.baselines.split(",") if name]
    on_gpu = device.startswith("cuda")
    served = model_layers(SERVED_MODEL) if SERVED in parts else ()
    compiled = {shape.shape: shape for shape in (*shapes, *served)}
    compiler = _compile_humming(list(compiled.values())) if on_gpu and "humming" in baselines else None

    session = Session(arguments, Settings(device=device, replays=arguments.replays, cpu_seconds=0.01))
    runner = session.runner
    session.finish_part("ceilings")
    if "quantize" in parts:
        names = "humming,copy" if on_gpu else "none"
        for num_tokens, in_features in QUANTIZE_SIZES:
            if not session.out_of_time():
                runner.quantize([num_tokens], [in_features], quantize_implementations(device, names))
        session.finish_part("quantize")
    if compiler is not None:
        _wait_for(compiler, arguments.budget / 2)
        session.finish_part("humming compiled")

    stop = session.out_of_time
    if "gemm" in parts:
        implementations = gemm_implementations(arguments.variants.split(","), baselines, GROUPS)
        for shape in shapes:
            runner.products([shape], tokens, implementations, should_stop=stop)
            session.finish_part(f"gemm {shape.shape}")
    if "sustained" in parts and on_gpu:
        runner.settings = replace(runner.settings, methods=("sustained",))
        wanted = [name for name in baselines if name in ("humming", "fp8", "fp16")]
        runner.products(shapes, SUSTAINED_TOKENS, gemm_implementations(["default"], wanted, GROUPS), should_stop=stop)
        runner.settings = replace(runner.settings, methods=("graph",))
        session.finish_part("sustained")
    if "extras" in parts:
        extras = [MarlinGemm(variant, group) for group in GROUPS for variant in ("bias", "bf16")]
        plain = [MarlinGemm("default", group) for group in GROUPS]
        chosen = shapes[1:3] or shapes
        runner.products(chosen, EXTRA_TOKENS, [*plain, *extras], operation="epilogue", should_stop=stop)
        session.finish_part("bias and bf16")
    if "linear" in parts:
        layers = linear_implementations(["chain"], GROUPS)
        narrow = [shape for shape in shapes if shape.in_features <= 8192]
        runner.products(narrow, [1, 16, 32, 64], layers, operation="linear", should_stop=stop)
        session.finish_part("linear")
    if served:
        wanted = [name for name in baselines if name in ("humming", "fp16")]
        layers = decoder_layer_implementations(served, wanted, GROUPS, served=True)
        whole = decoder_layer(SERVED_MODEL, served)
        runner.products([whole], SERVED_TOKENS, layers, operation=SERVED, should_stop=stop)
        session.finish_part(SERVED)

    print_summary(runner.run)
    print(f"{session.seconds():.0f} s, saved in {arguments.json.name}")
    return 1 if runner.run.num_wrong else 0


def _compile_humming(shapes: list[Layer]) -> subprocess.Popen[str]:
    script = Path(__file__).resolve().parent / "compile_humming.py"
    return subprocess.Popen(
        [sys.executable, str(script), ",".join(shape.shape for shape in shapes)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _wait_for(compiler: subprocess.Popen[str], seconds: float) -> None:
    try:
        output, _ = compiler.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        compiler.kill()
        output, _ = compiler.communicate()
        output += f"\nhumming: not compiled within {seconds:.0f} s"
    print("\n".join(output.strip().splitlines()[-3:]), flush=True)


def print_summary(run: Run) -> None:
    """Short: the reply that carries it may be cut at its beginning. The goals come last."""
    for line in footnotes(run):
        print(line[:400])
    for measurement in run.measurements:
        if measurement.wrong:
            print(f"{measurement.implementation} {measurement.key}: {measurement.check}")
    for m in run.find(operation="quantize"):
        if m.median_us:
            size = f"{m.num_tokens}x{m.in_features}"
            print(f"quantize {m.implementation:10} {size:12} {m.median_us:8.2f} us {m.gbps or 0.0:6.0f} GB/s")
    for method in ("graph", "sustained"):
        rows = [m for m in run.measurements if m.operation == "gemm" and m.method == method and m.median_us]
        if rows:
            _print_short_table(method, rows)
    for goal in judge(run):
        print(goal.line())


def _print_short_table(method: str, rows: list[Measurement]) -> None:
    table = {(m.out_features, m.in_features, m.num_tokens, m.implementation, m.group_size): m for m in rows}
    print(f"{method}, us: {'N x K':12}{'M':>6}{'floor':>8}" + "".join(f"{head:>8}" for head, _ in SHORT_COLUMNS))
    for n, k in dict.fromkeys((m.out_features, m.in_features) for m in rows):
        for tokens in SHOWN_TOKENS:
            found = [table.get((n, k, tokens, *key)) for _, key in SHORT_COLUMNS]
            if not any(found):
                continue
            floor = next((m.floor_us for m in found[1:] if m and m.implementation.startswith(OURS)), None)
            cells = [floor] + [time_of(m) if m else None for m in found]
            print(
                f"{f'{n}x{k}':>{len(method) + 18}}{tokens:>6}"
                + "".join(f"{value:>8.1f}" if value is not None else f"{'-':>8}" for value in cells)
            )


if __name__ == "__main__":
    sys.exit(main())
