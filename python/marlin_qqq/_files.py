"""Writing files so that a reader, or an interruption, never meets half of one."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import stat
import sys
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
        _write_special(Path(path), text)
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
    """A device, a pipe, or an open file of this process: nothing that may be replaced by a rename."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)) or _descriptor(path) is not None


def _descriptor(path: Path) -> int | None:
    """The number of the open file that /dev/stdout, /dev/fd/1 and the like stand for."""
    if path.is_symlink() and (target := os.readlink(path)).startswith("/proc/self/fd/"):
        path = Path(target)
    open_files = os.path.realpath("/proc/self/fd")
    return int(path.name) if path.name.isdecimal() and os.path.realpath(path.parent) == open_files else None


def _write_special(path: Path, text: str) -> None:
    descriptor = _descriptor(path)
    if descriptor is None:
        path.write_text(text, encoding="utf-8")
        return
    # Not opened anew: where it is a file, what is printed before and after has its own place in it.
    sys.stdout.flush()
    sys.stderr.flush()
    with os.fdopen(os.dup(descriptor), "w", encoding="utf-8") as file:
        file.write(text)
