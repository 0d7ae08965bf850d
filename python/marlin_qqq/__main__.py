"""`python -m marlin_qqq` is the `marlin-qqq` command."""

from marlin_qqq.cli import main

main()
