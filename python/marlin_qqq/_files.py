"""Writing files so that a reader, or an interruption, never meets half of one."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# What an interruption may leave behind ends like this.
TEMPORARY_SUFFIX = ".tmp"


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside ``path`` to write to. It gets the name when the block ends, and is removed when it fails.

    The folder is made where there is none. A link stays: what it leads to is written.
    """
    path, temporary = _prepare(path)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # a machine that stops must not leave the name without the content
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Writes UTF-8 text; into a device or a pipe directly, for a rename would put a file in its place."""
    if _is_special(Path(path)):
        Path(path).write_text(text, encoding="utf-8")
        return
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json_atomically(path: str | os.PathLike[str], value: Mapping[str, Any], sort_keys: bool = False) -> None:
    """Writes a JSON object, indented."""
    write_text_atomically(path, json.dumps(value, indent=2, sort_keys=sort_keys) + "\n")


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raises the OSError that writing ``path`` would end in, while there is nothing to lose yet. Makes the folder."""
    if not _is_special(Path(path)):
        _, temporary = _prepare(path)
        temporary.touch()
        temporary.unlink()


def _prepare(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """The file that ``path`` leads to, and a name beside it that nobody else has."""
    path = Path(path)
    if path.is_symlink():
        path = Path(os.path.realpath(path))
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder, not a file", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: two processes that write the same file do not write into each other's.
    return path, path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")


def _is_special(path: Path) -> bool:
    """A device, a pipe, or an open file of the process (/dev/stdout): nothing that may be replaced by a rename."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    open_file = path.is_symlink() and os.readlink(path).startswith("/proc/")
    return open_file or not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))
