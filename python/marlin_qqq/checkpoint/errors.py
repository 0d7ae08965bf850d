"""The one exception of everything that reads or writes checkpoints."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint folder cannot be used. The message names the file or tensor, what was found and what is allowed."""
