"""`marlin-qqq convert SRC DST`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from marlin_qqq.convert import ConversionPlan, ConversionResult


def command(
    source: Annotated[
        Path, typer.Argument(help="Folder with config.json and safetensors: fp16, bf16, fp32, GPTQ int4 or QQQ.")
    ],
    destination: Annotated[Path, typer.Argument(help="Folder to make. Nothing is overwritten.")],
    group_size: Annotated[
        int | None,
        typer.Option(help="128, or -1 for one scale a channel. Default: 128, or the source's own groups."),
    ] = None,
    method: Annotated[str, typer.Option(help="rtn (round to nearest) or gptq (needs --calibration).")] = "rtn",
    clip: Annotated[
        bool, typer.Option(help="Search scales that clip the largest weights for less squared error.")
    ] = True,
    calibration: Annotated[
        Path | None, typer.Option(help="UTF-8 text for gptq, like what the model will read.")
    ] = None,
    calibration_samples: Annotated[int, typer.Option(help="Sequences of the calibration text.")] = 128,
    calibration_length: Annotated[int, typer.Option(help="Tokens a calibration sequence.")] = 512,
    skip: Annotated[
        list[str] | None,
        typer.Option(help="Module to leave as it is, besides the output embeddings: a name or dotted part of one."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of what is not quantised: auto, float16 or bfloat16.")] = "auto",
    device: Annotated[str, typer.Option(help="Where quantisation computes: cpu, cuda, cuda:INDEX or auto.")] = "cpu",
    max_shard_size: Annotated[str, typer.Option(help="Split the output into files of at most this size.")] = "5GB",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be written, write nothing.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Throw an unfinished conversion away.")] = False,
) -> None:
    """Convert a Hugging Face, GPTQ or QQQ model folder to a QQQ checkpoint.

    An interrupted conversion leaves DESTINATION.partial; the same command goes on from there.
    """
    from marlin_qqq.convert import ConversionOptions, plan_conversion, run_conversion
    from marlin_qqq.convert.run import check_conversion

    options = ConversionOptions(
        group_size=group_size,
        method=method,
        clip=clip,
        calibration=calibration,
        num_samples=calibration_samples,
        sequence_length=calibration_length,
        skip=tuple(skip or ()),
        dtype=dtype,  # type: ignore[arg-type]
        max_shard_bytes=parse_size(max_shard_size),
        device=device,
    )
    plan = plan_conversion(source, destination, options)
    _show_plan(plan)
    if dry_run:
        check_conversion(plan, restart=restart)
        typer.echo("dry run: nothing was written")
        return
    try:
        result = _run_with_bar(plan, restart, run_conversion)
    except KeyboardInterrupt:
        typer.echo(f"interrupted: the same command goes on from {destination}.partial", err=True)
        raise typer.Exit(130) from None
    _show_result(result)


def parse_size(text: str) -> int:
    """Bytes of "5GB", "500MB" or a plain number."""
    for suffix, factor in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if text.upper().endswith(suffix) and text[: -len(suffix)].strip().isdecimal():
            return int(text[: -len(suffix)]) * factor
    if text.isdecimal():
        return int(text)
    raise typer.BadParameter(f"max-shard-size is {text!r}; allowed: a number of bytes, or one with KB, MB or GB")


def format_bytes(count: int) -> str:
    """1234567 as "1.2 MB"."""
    value = float(count)
    for unit in ("B", "KB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError


def _show_plan(plan: ConversionPlan) -> None:
    groups = "groups of 128" if plan.settings.group_size == 128 else "one scale a channel"
    source = plan.source
    typer.echo(f"{source.directory} ({source.kind}) -> {plan.destination} (QQQ, {groups})")
    typer.echo(f"{len(source.layers)} linear layers quantised, {len(source.others)} tensors copied as {plan.dtype}")
    for name, reason in (source.skipped | source.joined).items():
        typer.echo(f"  kept as it is: {name} ({reason})")
    for shard in plan.shards:
        typer.echo(f"  {shard.file_name}  {format_bytes(shard.num_bytes)}")
    ratio = plan.source_bytes / max(plan.output_bytes, 1)
    typer.echo(
        f"{format_bytes(plan.source_bytes)} -> {format_bytes(plan.output_bytes)} ({ratio:.2f}x smaller); "
        f"working memory about {format_bytes(plan.working_bytes)}"
    )


def _run_with_bar(plan: ConversionPlan, restart: bool, run) -> ConversionResult:  # type: ignore[no-untyped-def]
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from marlin_qqq.convert.run import peak_memory_bytes

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("peak {task.fields[peak]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("starting", total=plan.output_bytes, peak="")

        def advance(name: str, num_bytes: int) -> None:
            bar.update(task, advance=num_bytes, description=name[-40:], peak=format_bytes(peak_memory_bytes()))

        return run(plan, restart=restart, progress=advance)


def _show_result(result: ConversionResult) -> None:
    for name, columns in result.repaired.items():
        typer.echo(f"  repaired: {name}, {len(columns)} columns left the int8 range (first: {columns[0]})")
    if result.left_behind:
        typer.echo(f"  not copied: {', '.join(result.left_behind)}")
    resumed = f", {result.resumed_shards} files from an earlier run" if result.resumed_shards else ""
    typer.echo(
        f"{result.directory}: {result.quantized_layers} layers in {result.seconds:.1f} s{resumed}; "
        f"peak memory {format_bytes(result.peak_bytes)}"
    )
