"""marlin-qqq collect-env: print what a bug report needs."""

from __future__ import annotations


def command() -> None:
    """Print versions, libraries, devices and a self-test: paste it into a bug report. Never fails."""
    from marlin_qqq.collect_env import print_report

    print_report()
