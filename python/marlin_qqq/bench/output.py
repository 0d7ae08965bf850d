"""What a finished run leaves: tables on the terminal, files where they were asked for, and the exit code."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.measure import Measurement as RichMeasurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from marlin_qqq._files import check_writable, write_text_atomically
from marlin_qqq.bench.results import Run
from marlin_qqq.bench.tables import footnotes, measurement_table

# Columns are never dropped: where the output is no terminal (a log, a file) the table gets the width it needs.
WIDTH_OF_A_LOG = 200
NOTHING_TO_PLOT = "no more than one batch size, and no baseline to compare with"
DROPPED_FIRST = ("p10-p90", "x int_mm", "GB/s", "x vllm_qqq", "x vllm_w8a8", "TOPS", "x read", "layer", "x fp16")


def make_console(stderr: bool = False) -> Console:
    """A console without markup: names of files, GPUs and implementations may hold brackets."""
    console = Console(stderr=stderr, markup=False)
    return console if console.is_terminal else Console(stderr=stderr, markup=False, width=WIDTH_OF_A_LOG)


@contextlib.contextmanager
def progress_bar(total: int) -> Iterator[Callable[[str], None]]:
    """A live bar on stderr; yields a function that names the next of ``total`` steps."""
    console = make_console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("starting", total=total)
        started = False

        def step(message: str) -> None:
            nonlocal started
            progress.update(task, description=message, advance=1 if started else 0)
            started = True

        yield step


def check_files(json_path: Path | None, csv_path: Path | None, plot_folder: Path | None) -> None:
    """Raises OSError where `write_files` could not write, before anything is measured."""
    for path in (json_path, csv_path, plot_folder and plot_folder / "plot.png"):
        if path is not None:
            check_writable(path)


def write_files(run: Run, json_path: Path | None, csv_path: Path | None, plot_folder: Path | None) -> list[Path]:
    """Writes what was asked for; returns the files written."""
    written = []
    if json_path is not None:
        write_text_atomically(json_path, run.to_json())
        written.append(json_path)
    if csv_path is not None:
        write_text_atomically(csv_path, run.to_csv())
        written.append(csv_path)
    if plot_folder is not None:
        from marlin_qqq.bench.plots import plot_run

        written += plot_run(run, plot_folder)
    return written


def show(run: Run, console: Console) -> None:
    """The run's table with its footnotes. A narrow terminal gets fewer columns, and is told which."""
    print_table(measurement_table(run), console)
    for line in footnotes(run):
        console.print(line, style="dim", highlight=False, markup=False)


def print_table(table: Table, console: Console, dropped_first: Sequence[str] = DROPPED_FIRST) -> None:
    """Prints a table with the columns that fit, and says which do not."""
    dropped = fit_width(table, console, dropped_first)
    console.print(table)
    if dropped:
        console.print(f"Left out, for the terminal is narrow: {', '.join(dropped)}.", style="dim", highlight=False)


def fit_width(table: Table, console: Console, dropped_first: Sequence[str] = DROPPED_FIRST) -> list[str]:
    """Removes columns, the least needed first, until ``table`` fits the console; returns their headers."""
    wide = console.options.update(width=10_000)
    for column in table.columns:
        if column.no_wrap:  # rich counts the longest word only, though nothing of such a column is wrapped
            cells = (column.header, *column.cells)
            column.min_width = max(RichMeasurement.get(console, wide, cell).maximum for cell in cells)
    dropped = []
    for header in dropped_first:
        if RichMeasurement.get(console, wide, table).minimum <= console.width:
            break
        if any(column.header == header for column in table.columns):
            table.columns = [column for column in table.columns if column.header != header]
            dropped.append(header)
    return dropped


def exit_code(run: Run) -> int:
    """1 when any result was wrong, ours or a baseline's, or when none of our measurements came about."""
    measured = any(m.median_us for m in run.measurements)
    return 1 if run.num_wrong or not measured else 0
