"""The `marlin-qqq` command: one file a subcommand, imported only when that subcommand runs.

How to add a subcommand `name` (the code of `some-name` lives in `some_name.py`):

1. Write `marlin_qqq/cli/name.py`. It exposes ONE of
   - `command`: a plain function with Typer annotations, whose docstring is the subcommand's help
     (`def command(source: Annotated[Path, typer.Argument(help="...")], dry_run: bool = False) -> None`), or
   - `app`: a `typer.Typer()` with commands of its own (`marlin-qqq bench gemm ...`).
   The file is imported only when the subcommand runs, so it may import torch at its top.
2. Add a row to `SUBCOMMANDS`: the name and the one line that `marlin-qqq --help` shows.

Errors: raise `CliError("what is wrong, the value, what is allowed")` for what the user can put right. It is shown on
stderr and the exit status is 1. A ValueError, OSError, RuntimeError or ImportError that leaves a subcommand is shown so
too; MARLIN_QQQ_TRACEBACK=1 shows the traceback instead. For another exit status raise `typer.Exit(code)`.

Tests: `typer.testing.CliRunner().invoke(marlin_qqq.cli.app.app, ["name", ...])`, the same path as the console script.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Annotated, Any

import typer

SUBCOMMANDS = {
    "demo": "Quantise a language model, run it through the ops and compare it with the original.",
    "bench": "Benchmark the kernels against baselines and the machine's own limits.",
    "convert": "Convert a Hugging Face or GPTQ model folder to a QQQ checkpoint.",
    "verify": "Check a QQQ checkpoint, and its layers against the original model.",
    "perplexity": "Measure the perplexity of a model folder on a text file.",
    "collect-env": "Print what a bug report needs.",
}


class CliError(Exception):
    """Something the user can put right. The message names the argument, its value and what is allowed."""


def _load(name: str) -> Any:
    """The click command of one subcommand; imports that subcommand's file."""
    module = importlib.import_module(f"marlin_qqq.cli.{name.replace('-', '_')}")
    sub_app = getattr(module, "app", None)
    if sub_app is None:
        sub_app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})
        sub_app.command(name)(module.command)
    return typer.main.get_command(sub_app)


def _run(name: str, arguments: list[str]) -> None:
    try:
        _load(name).main(args=arguments, prog_name=f"marlin-qqq {name}")
    except (CliError, ValueError, OSError, RuntimeError, ImportError) as error:
        if os.environ.get("MARLIN_QQQ_TRACEBACK"):
            raise
        message = str(error).strip() or type(error).__name__
        if not isinstance(error, (CliError, ValueError)):
            message += "\n(MARLIN_QQQ_TRACEBACK=1 shows where this comes from)"
        message = f"marlin-qqq {name}: {message}"
        # no-color.org: the variable, not empty, asks for no colours on a terminal, either.
        typer.echo(message if os.environ.get("NO_COLOR") else typer.style(message, fg="red"), err=True)
        raise typer.Exit(1) from error


def _show_version(wanted: bool) -> None:
    if not wanted:
        return
    from marlin_qqq._version import __version__

    typer.echo(f"marlin-qqq {__version__}")
    raise typer.Exit


app = typer.Typer(
    name="marlin-qqq",
    help="W4A8 matrix products in the QQQ format: 4-bit weights, 8-bit activations.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _register(name: str, summary: str) -> None:
    # The row in the help costs no import: everything after the name goes, unread, to the subcommand's own parser.
    @app.command(
        name,
        help=summary,
        add_help_option=False,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    )
    def run(context: typer.Context) -> None:
        _run(name, context.args)


for _name, _summary in SUBCOMMANDS.items():
    _register(_name, _summary)


def main() -> None:
    """Entry point of the `marlin-qqq` script and of `python -m marlin_qqq`."""
    typer.main.get_command(app).main(args=sys.argv[1:], prog_name="marlin-qqq")
