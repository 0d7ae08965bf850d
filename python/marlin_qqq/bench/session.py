"""One benchmark from the command line: run under a progress bar, show, save, and say by the exit code how it went."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from marlin_qqq.bench.output import (
    NOTHING_TO_PLOT,
    check_files,
    exit_code,
    make_console,
    print_table,
    progress_bar,
    show,
    write_files,
)
from marlin_qqq.bench.results import Run
from marlin_qqq.bench.runner import Runner, Settings
from marlin_qqq.bench.sweep import cliffs_of_run
from marlin_qqq.bench.tables import CLIFFS_DROPPED_FIRST, TUNE_DROPPED_FIRST, cliff_table, tune_table
from marlin_qqq.bench.tune import tune_results


class Terminated(KeyboardInterrupt):
    """SIGTERM, as a batch system sends it when the time is over."""


def show_cliffs(run: Run, console: Console) -> None:
    """Prints the cliffs of every implementation and shape of a run."""
    cliffs = cliffs_of_run(run)
    if cliffs:
        print_table(cliff_table(cliffs), console, CLIFFS_DROPPED_FIRST)
    console.print(f"{len(cliffs)} cliffs: steps beyond the work added, or batches slower than larger ones.")


def show_tune(run: Run, console: Console) -> None:
    """Prints the planner's choices beside the fastest candidates."""
    print_table(tune_table(tune_results(run.measurements)), console, TUNE_DROPPED_FIRST)


def measure(
    settings: Settings,
    steps: int,
    work: Callable[[Runner], None],
    files: tuple[Path | None, Path | None, Path | None],
    show_more: Callable[[Run, Console], None] | None = None,
) -> None:
    """Runs ``work`` under a progress bar, shows and saves what came of it, and exits with 1 after a wrong result.

    What was measured before an interruption or an error is shown and saved, too, with a note in the run.
    """
    if files[2] is not None:
        from marlin_qqq.bench import plots  # noqa: F401  a missing matplotlib should stop us before the run
    check_files(*files)
    runner: Runner | None = None
    stopped: BaseException | None = None
    with _terminations_raised():
        try:
            with progress_bar(steps + 1) as step:
                runner = Runner(settings, step)
                work(runner)
        except (KeyboardInterrupt, Exception) as error:
            if runner is None or not runner.run.measurements:
                raise
            stopped = error
            how = "interrupted" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}"
            runner.run.notes.append(f"Not complete ({how}).")
    console = make_console()
    show(runner.run, console)
    if show_more is not None:
        show_more(runner.run, console)
    written = write_files(runner.run, *files)
    for path in written:
        console.print(f"wrote {path}", highlight=False)
    if files[2] is not None and not set(written) - set(files):
        console.print(f"nothing to plot: {NOTHING_TO_PLOT}")
    if isinstance(stopped, KeyboardInterrupt):
        raise typer.Exit(128 + (signal.SIGTERM if isinstance(stopped, Terminated) else signal.SIGINT))
    if stopped is not None:
        raise stopped
    if code := exit_code(runner.run):
        raise typer.Exit(code)


@contextlib.contextmanager
def _terminations_raised() -> Iterator[None]:
    """SIGTERM raises `Terminated` here, so that it can be caught as Ctrl-C is."""

    def stop(number: int, frame: Any) -> None:
        raise Terminated

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # only the main thread may set handlers
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
