"""`marlin-qqq bench ...`: how fast the kernels are, beside their baselines and the machine's own limits.

How the numbers are made and how to read the columns: docs/benchmark.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from marlin_qqq.bench.arguments import (
    BaselinesOption,
    BiasOption,
    CsvOption,
    DeviceOption,
    DtypeOption,
    GroupOption,
    JsonOption,
    MethodOption,
    ModelOption,
    PlotOption,
    ReplaysOption,
    SecondsOption,
    SeedOption,
    ServedOption,
    ShapeOption,
    TensorParallelOption,
    TokensOption,
    VariantOption,
    make_settings,
    select_groups,
    select_layers,
    select_tokens,
    split,
)
from marlin_qqq.bench.session import measure, show_cliffs, show_tune

app = typer.Typer(
    help="Benchmark the kernels against baselines and the machine's own limits.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def gemm(
    model: ModelOption = None,
    tensor_parallel: TensorParallelOption = 1,
    shape: ShapeOption = None,
    num_tokens: TokensOption = "",
    group_size: GroupOption = "128,-1",
    variant: VariantOption = "default,constant",
    baselines: BaselinesOption = "auto",
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float16",
    method: MethodOption = "graph",
    replays: ReplaysOption = 15,
    seconds: SecondsOption = 0.2,
    bias: BiasOption = False,
    seed: SeedOption = 0,
    json_path: JsonOption = None,
    csv_path: CsvOption = None,
    plot: PlotOption = None,
) -> None:
    """The product alone: marlin_qqq_gemm on activations that are quantised already."""
    from marlin_qqq.bench.implementations import gemm_implementations, parse_baselines

    settings = make_settings(device, dtype, method, replays, seconds, bias, seed)
    variants = split(variant) if settings.on_gpu else ["default"]
    layers, tokens, groups = (
        select_layers(model, tensor_parallel, shape),
        select_tokens(num_tokens, settings),
        select_groups(group_size),
    )
    implementations = gemm_implementations(variants, parse_baselines(baselines, settings.device), groups)
    measure(
        settings,
        len(layers) * len(tokens),
        lambda runner: runner.products(layers, tokens, implementations),
        (json_path, csv_path, plot),
    )


@app.command()
def quantize(
    in_features: Annotated[
        str, typer.Option("--in-features", "-k", help="Row widths, comma-separated.")
    ] = "4096,8192,28672",
    num_tokens: TokensOption = "",
    baselines: Annotated[str, typer.Option(help="auto, none, or of: torch, torch_compile, humming, copy.")] = "auto",
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float16",
    replays: ReplaysOption = 15,
    seconds: SecondsOption = 0.2,
    seed: SeedOption = 0,
    json_path: JsonOption = None,
    csv_path: CsvOption = None,
    plot: PlotOption = None,
) -> None:
    """quantize_per_token alone: activations to int8 with one scale a row."""
    from marlin_qqq.bench.implementations.quantize import quantize_implementations
    from marlin_qqq.bench.presets import parse_integers

    settings = make_settings(device, dtype, "graph", replays, seconds, False, seed)
    widths, tokens = parse_integers(in_features), select_tokens(num_tokens, settings)
    if widths[0] < 1:
        raise ValueError(f"--in-features {in_features!r}: every row must have at least one element")
    implementations = quantize_implementations(settings.device, baselines)
    measure(
        settings,
        len(widths) * len(tokens),
        lambda runner: runner.quantize(tokens, widths, implementations),
        (json_path, csv_path, plot),
    )


@app.command()
def linear(
    model: ModelOption = None,
    tensor_parallel: TensorParallelOption = 1,
    shape: ShapeOption = None,
    num_tokens: TokensOption = "",
    group_size: GroupOption = "128,-1",
    baselines: BaselinesOption = "auto",
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float16",
    method: MethodOption = "graph",
    replays: ReplaysOption = 15,
    seconds: SecondsOption = 0.2,
    bias: BiasOption = False,
    served: ServedOption = False,
    seed: SeedOption = 0,
    json_path: JsonOption = None,
    csv_path: CsvOption = None,
    plot: PlotOption = None,
) -> None:
    """A linear layer as a model runs it: quantise, product, epilogue; beside the product alone (variant "constant").

    With --served every layer comes behind a kernel of torch's, whose own time is the row "between".
    """
    from marlin_qqq.bench.implementations import parse_baselines
    from marlin_qqq.bench.implementations.layers import linear_implementations

    settings = make_settings(device, dtype, method, replays, seconds, bias, seed)
    layers, tokens, groups = (
        select_layers(model, tensor_parallel, shape),
        select_tokens(num_tokens, settings),
        select_groups(group_size),
    )
    chosen = linear_implementations(parse_baselines(baselines, settings.device), groups, served)
    measure(
        settings,
        len(layers) * len(tokens),
        lambda runner: runner.products(layers, tokens, chosen, operation="linear"),
        (json_path, csv_path, plot),
    )


@app.command()
def layer(
    model: Annotated[str, typer.Option(help="A model's preset (see `bench models`).")] = "llama-3.1-8b",
    tensor_parallel: TensorParallelOption = 1,
    num_tokens: TokensOption = "",
    group_size: GroupOption = "128,-1",
    baselines: BaselinesOption = "auto",
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float16",
    method: MethodOption = "graph",
    replays: ReplaysOption = 15,
    seconds: SecondsOption = 0.2,
    served: ServedOption = False,
    seed: SeedOption = 0,
    json_path: JsonOption = None,
    csv_path: CsvOption = None,
    plot: PlotOption = None,
) -> None:
    """The four linears of a decoder layer, one after the other: qkv, o, gate_up, down. Attention is not part of it.

    With --served each comes behind a kernel of torch's, all of whose own time is the row "between".
    """
    from marlin_qqq.bench.implementations import parse_baselines
    from marlin_qqq.bench.implementations.layers import decoder_layer, decoder_layer_implementations
    from marlin_qqq.bench.presets import model_layers

    settings = make_settings(device, dtype, method, replays, seconds, False, seed)
    parts, tokens, groups = (
        model_layers(model, tensor_parallel),
        select_tokens(num_tokens, settings),
        select_groups(group_size),
    )
    chosen = decoder_layer_implementations(parts, parse_baselines(baselines, settings.device), groups, served)
    whole = decoder_layer(f"{model} tp{tensor_parallel}", parts)
    measure(
        settings,
        len(tokens),
        lambda runner: runner.products([whole], tokens, chosen, operation="layer"),
        (json_path, csv_path, plot),
    )


@app.command()
def sweep(
    model: ModelOption = None,
    tensor_parallel: TensorParallelOption = 1,
    shape: ShapeOption = None,
    num_tokens: TokensOption = "1:512",
    group_size: GroupOption = "128,-1",
    variant: VariantOption = "default",
    baselines: BaselinesOption = "none",
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float16",
    replays: ReplaysOption = 9,
    seconds: SecondsOption = 0.05,
    seed: SeedOption = 0,
    json_path: JsonOption = None,
    csv_path: CsvOption = None,
    plot: PlotOption = None,
) -> None:
    """Every batch size in a range; finds cliffs: steps dearer than the work added, batches slower than larger ones."""
    from marlin_qqq.bench.implementations import gemm_implementations, parse_baselines

    settings = make_settings(device, dtype, "graph", replays, seconds, False, seed)
    layers, tokens, groups = (
        select_layers(model, tensor_parallel, shape),
        select_tokens(num_tokens, settings),
        select_groups(group_size),
    )
    variants = split(variant) if settings.on_gpu else ["default"]
    implementations = gemm_implementations(variants, parse_baselines(baselines, settings.device), groups)
    measure(
        settings,
        len(layers) * len(tokens),
        lambda runner: runner.products(layers, tokens, implementations),
        (json_path, csv_path, plot),
        show_cliffs,
    )


@app.command()
def tune(
    model: ModelOption = None,
    tensor_parallel: TensorParallelOption = 1,
    shape: ShapeOption = None,
    num_tokens: TokensOption = "1,8,16,17,32,33,64,65,128,129,192,256,257,512,1024,2048,4096",
    group_size: GroupOption = "128,-1",
    limit: Annotated[int, typer.Option(min=1, help="The planner's best candidates to try for each problem.")] = 12,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float16",
    replays: ReplaysOption = 9,
    seed: SeedOption = 0,
    json_path: JsonOption = None,
    csv_path: CsvOption = None,
) -> None:
    """The planner's candidate launches on this GPU: is its choice the fastest? Needs a GPU.

    A quick look. To fit the planner to a GPU, benchmarks/tune_planner.py in the repository measures more and does it.
    """
    from marlin_qqq.bench.tune import run_tune

    settings = make_settings(device, dtype, "graph", replays, 0.1, False, seed)
    if not settings.on_gpu:
        raise ValueError("bench tune times CUDA kernels: it needs a GPU (--device cuda), and the CPU has no tiles")
    layers, tokens, groups = (
        select_layers(model, tensor_parallel, shape),
        select_tokens(num_tokens, settings),
        select_groups(group_size),
    )
    measure(
        settings,
        len(layers) * len(tokens) * len(groups),
        lambda runner: run_tune(runner, layers, tokens, groups, limit),
        (json_path, csv_path, None),
        show_tune,
    )


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(help="A run saved with --json.")],
    after: Annotated[Path, typer.Argument(help="The run to judge.")],
    threshold: Annotated[float, typer.Option(min=0.0, help="Smallest relative change that counts.")] = 0.02,
    relative_to: Annotated[
        str | None, typer.Option(help="First divide by the times of fp16, humming, ...: for two GPUs.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Show what did not change, too.")] = False,
    fail: Annotated[bool, typer.Option("--fail", help="Exit with 1 when something got slower.")] = False,
) -> None:
    """Two saved runs: what got slower or faster beyond the threshold and beyond the noise (p10 to p90)."""
    from marlin_qqq.bench.compare import compare_runs
    from marlin_qqq.bench.output import make_console, print_table
    from marlin_qqq.bench.results import load_run
    from marlin_qqq.bench.tables import COMPARISON_DROPPED_FIRST, comparison_table

    runs = {before: load_run(before), after: load_run(after)}
    if relative_to is not None:
        for path, run in runs.items():
            names = list(dict.fromkeys(m.implementation for m in run.measurements if m.median_us))
            if relative_to not in names:
                raise ValueError(
                    f"--relative-to is {relative_to!r}; measured in {path}: {', '.join(names) or 'nothing'}"
                )
    console = make_console()
    comparison = compare_runs(runs[before], runs[after], threshold, relative_to)
    for warning in comparison.warnings:
        console.print(f"Beware: {warning}.", style="yellow", highlight=False)
    # First of all, for a wrong result has no time: it is in no other line.
    for measurement in comparison.newly_wrong:
        console.print(f"{measurement.key}: {measurement.check}", style="bold red", highlight=False)
    if not comparison.changes and not comparison.newly_wrong:
        raise ValueError(f"{before} and {after} have no measurement in common")
    table = comparison_table(comparison, everything)
    if table.row_count:
        print_table(table, console, COMPARISON_DROPPED_FIRST)
    verdicts = [change.verdict for change in comparison.changes]
    console.print(
        f"{len(verdicts)} measurements in both: {verdicts.count('slower')} slower, {verdicts.count('faster')} faster, "
        f"{verdicts.count('same')} the same within {threshold:.0%} or noise; "
        f"{len(comparison.only_before)} only before, {len(comparison.only_after)} only after.",
        highlight=False,
    )
    if comparison.newly_wrong or (fail and comparison.regressions):
        raise typer.Exit(1)


@app.command()
def plot(
    run_path: Annotated[Path, typer.Argument(metavar="RUN.json", help="A run saved with --json.")],
    folder: Annotated[Path, typer.Argument(help="Folder for the PNG and SVG files.")],
) -> None:
    """Plots of a saved run."""
    from marlin_qqq.bench.output import NOTHING_TO_PLOT
    from marlin_qqq.bench.plots import plot_run
    from marlin_qqq.bench.results import load_run

    paths = plot_run(load_run(run_path), folder)
    if not paths:
        raise ValueError(f"{run_path} holds nothing to plot: {NOTHING_TO_PLOT}")
    for path in paths:
        typer.echo(path)


@app.command()
def models() -> None:
    """The model presets and their shapes."""
    from rich.table import Table

    from marlin_qqq.bench.output import make_console, print_table
    from marlin_qqq.bench.presets import MODELS, model_layers

    table = Table(title="out_features x in_features on one GPU")
    for header in ("model", "qkv", "o", "gate_up", "down"):
        table.add_column(header, no_wrap=True)
    for name in MODELS:
        table.add_row(name, *(entry.shape for entry in model_layers(name)))
    print_table(table, make_console(), ("o", "qkv", "down", "gate_up"))
