"""One benchmark from the command line: run under a progress bar, show, save, and say by the exit code how it went."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import typer
from rich.console import Console

from marlin_qqq.bench.output import exit_code, make_console, progress_bar, show, write_files
from marlin_qqq.bench.results import Run
from marlin_qqq.bench.runner import Runner, Settings
from marlin_qqq.bench.sweep import cliffs_of_run
from marlin_qqq.bench.tables import cliff_table, tune_table
from marlin_qqq.bench.tune import tune_results


def show_cliffs(run: Run, console: Console) -> None:
    """Prints the cliffs of every implementation and shape of a run."""
    cliffs = cliffs_of_run(run)
    if cliffs:
        console.print(cliff_table(cliffs))
    console.print(f"{len(cliffs)} cliffs: steps beyond the work added, or batches slower than larger ones.")


def show_tune(run: Run, console: Console) -> None:
    """Prints the planner's choices beside the fastest candidates."""
    console.print(tune_table(tune_results(run.measurements)))


def measure(
    settings: Settings,
    steps: int,
    work: Callable[[Runner], None],
    files: tuple[Path | None, Path | None, Path | None],
    show_more: Callable[[Run, Console], None] | None = None,
) -> None:
    """Runs ``work`` under a progress bar, shows and saves what came of it, and exits with 1 after a wrong result."""
    if files[2] is not None:
        from marlin_qqq.bench import plots  # noqa: F401  a missing matplotlib should stop us before the run
    with progress_bar(steps + 1) as step:
        runner = Runner(settings, step)
        work(runner)
    console = make_console()
    show(runner.run, console)
    if show_more is not None:
        show_more(runner.run, console)
    for path in write_files(runner.run, *files):
        console.print(f"wrote {path}", highlight=False)
    if code := exit_code(runner.run):
        raise typer.Exit(code)
