"""`marlin-qqq verify DIR`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from marlin_qqq._files import check_writable, write_json_atomically

if TYPE_CHECKING:
    from marlin_qqq.verify import VerificationReport


def command(
    directory: Annotated[Path, typer.Argument(help="QQQ folder, HandH1998/QQQ's or GPTQModel's.")],
    against: Annotated[
        Path | None, typer.Option(help="Folder with the original weights, for the error of each layer.")
    ] = None,
    max_error: Annotated[
        float | None, typer.Option(help="With --against: fail when a layer's relative error is larger.")
    ] = None,
    worst: Annotated[int, typer.Option(min=0, help="Layers to show, the worst first; 0 shows all.")] = 20,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report here as JSON.")] = None,
) -> None:
    """Check a QQQ checkpoint: shapes, dtypes, finite values, int8 range, architecture; and its layers' errors.

    Exit status 0: sound; 1: something is wrong.
    """
    from rich.console import Console
    from rich.progress import Progress

    from marlin_qqq.checkpoint import Checkpoint
    from marlin_qqq.verify import verify_checkpoint

    if max_error is not None and against is None:
        raise typer.BadParameter("max-error needs --against")
    if json_file is not None:
        check_writable(json_file)
    count = len(Checkpoint(directory, problems=[]).modules)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("layers", total=count)
        report = verify_checkpoint(directory, against, on_layer=lambda name: bar.update(task, advance=1))
    if json_file is not None:
        _write_json(json_file, report)
    _show(report, worst, against is not None)
    bad = []
    if max_error is not None:
        # "not at most": a comparison with NaN is false either way, and NaN must not pass.
        bad = [layer for layer in report.layers if not (layer.relative_error or 0.0) <= max_error]
    for layer in bad:
        typer.echo(f"{layer.module.name}: relative error {layer.relative_error:.4f} is above {max_error}", err=True)
    for problem in report.problems:
        typer.echo(problem, err=True)
    if bad or report.problems:
        raise typer.Exit(1)


def _show(report: VerificationReport, worst: int, compared: bool) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    repaired = [layer for layer in report.layers if layer.repaired_columns]
    shown = report.layers if compared else repaired
    shown = shown[:worst] if worst else shown
    if shown:
        table = Table(box=None)
        for title in ("layer", "N x K", "group"):
            table.add_column(title)
        if compared:
            table.add_column("relative error", justify="right")
            table.add_column("largest error", justify="right")
        table.add_column("repaired columns", justify="right")
        for layer in shown:
            module = layer.module
            row = [escape(module.name), f"{module.out_features} x {module.in_features}", str(module.group_size)]
            if compared:
                row += [f"{layer.relative_error:.4f}", f"{layer.max_error:.3g}"]
            table.add_row(*row, str(len(layer.repaired_columns)))
        Console(width=140, soft_wrap=True).print(table)
    verdict = "sound" if not report.problems else f"{len(report.problems)} problems"
    typer.echo(f"{len(report.layers)} quantised layers, {len(repaired)} in need of repair (done on loading): {verdict}")


def _write_json(path: Path, report: VerificationReport) -> None:
    layers = [
        {
            "layer": layer.module.name,
            "out_features": layer.module.out_features,
            "in_features": layer.module.in_features,
            "group_size": layer.module.group_size,
            "relative_error": layer.relative_error,
            "max_error": layer.max_error,
            "repaired_columns": list(layer.repaired_columns),
        }
        for layer in report.layers
    ]
    write_json_atomically(path, {"layers": layers, "problems": list(report.problems)})
