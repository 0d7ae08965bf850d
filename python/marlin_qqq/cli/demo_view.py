"""What `marlin-qqq demo` shows: a progress bar, which model runs where, a table, and the continuations."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console, Group
from rich.panel import Panel
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from marlin_qqq.cli.demo import Row, Source


def progress_bar(console: Console) -> Progress:
    """One bar for the whole demo; gone when it is done."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )


def describe(source: Source) -> Text:
    """Which model, where it runs."""
    parameters = sum(parameter.numel() for parameter in source.model.parameters())
    config = source.model.config
    if source.device.type == "cuda":
        place = torch.cuda.get_device_name(source.device)
    else:
        place = f"CPU, {torch.get_num_threads()} threads"
    run_dtype = str(source.run_dtype).removeprefix("torch.")
    return Text.assemble(
        ("Model  ", "bold"),
        f"{_short(source.folder)}: {type(source.model).__name__}, {parameters / 1e6:.1f} M parameters, "
        f"{config.num_hidden_layers} layers, hidden size {config.hidden_size}\n",
        ("Device ", "bold"),
        f"{place}; torch {torch.__version__}; activations {run_dtype}",
    )


def _short(folder: Path) -> str:
    with contextlib.suppress(ValueError):
        return str(folder.resolve().relative_to(Path.cwd()))
    return str(folder)


def results_table(rows: list[Row], source: Source, method: str) -> Table:
    """Sizes, perplexities and speeds; differences are against the first row."""
    used = source.token_ids.numel()
    share = "" if used == source.text_tokens else f", the first of {source.text_tokens:,}"
    table = Table(
        title="Original and QQQ (4-bit weights, 8-bit activations)",
        caption=f"Perplexity on {used:,} tokens{share}, windows of {source.window}: lower is better. "
        f"Reading: that text, {source.batch_size} windows at once; writing: one token after the other. "
        f"MB = 10^6 bytes, scales included. Scales by {method}.",
        caption_justify="left",
    )
    table.add_column("Weights")
    table.add_column("Linear MB", justify="right")
    table.add_column("Perplexity", justify="right")
    table.add_column("Reading\ntokens/s", justify="right")
    table.add_column("Writing\ntokens/s", justify="right")
    first = rows[0]
    for row in rows:
        size, perplexity = f"{row.linear_bytes / 1e6:.2f}", f"{row.perplexity.value:.3f}"
        if row is not first:
            size += f"  (1/{first.linear_bytes / row.linear_bytes:.1f})"
            perplexity += f"  ({row.perplexity.value / first.perplexity.value - 1:+.1%})"
        table.add_row(
            row.name,
            size,
            perplexity,
            f"{row.perplexity.tokens_per_second:,.0f}",
            f"{row.continuation.tokens_per_second:,.0f}",
        )
    return table


def continuation_panel(row: Row, first: Row, prompt: str, highlight: bool) -> Panel:
    """The prompt (dim) and what the model made of it."""
    text = prompt + row.continuation.text.rstrip()
    if highlight:
        shown = Syntax("", "python", theme="ansi_dark", background_color="default").highlight(text)
        shown.rstrip()
    else:
        shown = Text(text)
    shown.stylize("dim", 0, len(prompt))
    footer = None
    if row is not first:
        ours, theirs = row.continuation.token_ids, first.continuation.token_ids
        same = next(
            (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
        )
        whole = same == len(ours) == len(theirs)
        footer = (
            "same as the original" if whole else f"same as the original for the first {same} of {len(theirs)} tokens"
        )
    return Panel(Group(shown), title=row.name, title_align="left", subtitle=footer, subtitle_align="right")
