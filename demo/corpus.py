"""The text that the demo model learns from: the Python standard library's source, with some modules set aside.

Three disjoint parts, each a list of documents:
  train       everything that is not set aside and not mechanical (code tables, generated data);
  validation  decides when training stops and which weights are kept;
  held_out    is never looked at while training: the perplexity that the demo prints is measured on it.
The test modules of a module that is set aside are left out of all three, because they repeat its text.
"""

from __future__ import annotations

import re
import tokenize
from dataclasses import dataclass, field
from pathlib import Path

HELD_OUT_MODULES = (
    "textwrap.py",
    "heapq.py",
    "shlex.py",
    "fractions.py",
    "queue.py",
    "csv.py",
    "calendar.py",
    "gzip.py",
    "tempfile.py",
    "http/cookies.py",
    "json/decoder.py",
    "zipapp.py",
)
VALIDATION_MODULES = (
    "configparser.py",
    "statistics.py",
    "selectors.py",
    "sched.py",
    "glob.py",
    "netrc.py",
    "getopt.py",
)

# Folders that are not the standard library, hold no prose or code to learn from, or repeat what is elsewhere.
_SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "pydoc_data",
    "lib2to3",
    "encoded_modules",
    "tokenizedata",
    "cjkencodings",
    "_bundled",
    "_vendor",
}
_SKIPPED_NAMES = re.compile(
    r"^(_sysconfigdata.*|_sysconfig_vars.*|bad_?\w*|cp\d+|iso8859_\d+|mac_\w+|koi8_\w+|tis_620)\.py$"
)


@dataclass
class Corpus:
    """Documents of the three parts. `library` and `tests` are the two halves of the training text."""

    library: list[str] = field(default_factory=list)
    tests: list[str] = field(default_factory=list)
    validation: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    held_out_names: list[str] = field(default_factory=list)
    validation_names: list[str] = field(default_factory=list)

    @property
    def train(self) -> list[str]:
        return self.library + self.tests

    def train_bytes(self) -> int:
        return sum(len(text.encode()) for text in self.train)


def read_corpus(standard_library: Path) -> Corpus:
    """Read every `*.py` below the folder; files that are missing, unreadable or mechanical are passed over."""
    corpus = Corpus()
    set_aside = HELD_OUT_MODULES + VALIDATION_MODULES
    # configparser -> test_configparser.py, test_configparser/...; json/decoder -> test_json/..., test_decoder.py
    related_tests = {"test_" + part for name in set_aside for part in Path(name).with_suffix("").parts}
    related_tests -= {"test_http"}  # test_http does not exist; test_http_cookies does
    related_tests |= {"test_http_cookies"}

    for path in sorted(standard_library.rglob("*.py")):
        relative = path.relative_to(standard_library)
        if _SKIPPED_FOLDERS & set(relative.parts[:-1]) or _SKIPPED_NAMES.match(relative.name):
            continue
        text = _read(path)
        if text is None or _is_mechanical(text):
            continue
        name = relative.as_posix()
        is_test = bool({"test", "tests", "idle_test"} & set(relative.parts[:-1]))
        if name in HELD_OUT_MODULES:
            corpus.held_out.append(text)
            corpus.held_out_names.append(name)
        elif name in VALIDATION_MODULES:
            corpus.validation.append(text)
            corpus.validation_names.append(name)
        elif is_test:
            if not related_tests & {Path(part).stem for part in relative.parts}:
                corpus.tests.append(text)
        else:
            corpus.library.append(text)
    if not corpus.library or not corpus.held_out or not corpus.validation:
        raise SystemExit(
            f"error: {standard_library} is not a Python standard library: found {len(corpus.library)} training, "
            f"{len(corpus.validation)} validation and {len(corpus.held_out)} held-out modules; each must be above 0"
        )
    return corpus


def _read(path: Path) -> str | None:
    try:
        with tokenize.open(path) as stream:  # honours the coding line
            return stream.read().replace("\r\n", "\n").expandtabs(8)
    except (OSError, SyntaxError, UnicodeDecodeError):
        return None


def _is_mechanical(text: str) -> bool:
    """Tables and generated data: too few letters, or lines that nobody would write."""
    visible = len(text) - sum(map(str.isspace, text))
    if visible < 64:
        return True
    letters = sum(character.isascii() and (character.isalpha() or character == "_") for character in text)
    longest_line = max(map(len, text.split("\n")))
    return letters < 0.55 * visible or longest_line > 2000
