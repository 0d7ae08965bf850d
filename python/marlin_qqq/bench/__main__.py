"""``python -m marlin_qqq.bench`` is ``marlin-qqq bench``: the same options, errors and exit codes."""

import sys

import typer

from marlin_qqq.cli.app import app

if __name__ == "__main__":
    typer.main.get_command(app).main(args=["bench", *sys.argv[1:]], prog_name="python -m marlin_qqq")
