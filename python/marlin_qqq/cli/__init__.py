"""Command line of marlin_qqq. `main` is the entry point; how to add a subcommand stands at the top of `app.py`."""


def main() -> None:
    """Run the `marlin-qqq` command with the process's arguments."""
    from marlin_qqq.cli.app import main as run

    run()
