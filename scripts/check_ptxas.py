"""Reads what ptxas said while CUDA files were compiled and fails on spills and warnings.

    python scripts/check_ptxas.py BUILD_FOLDER

keep_compiler_output.py leaves OBJECT.log beside every object that nvcc makes; compile_commands.json says which objects the
build has now. A build without CUDA has none, which is reported and is no failure; a missing log is one.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

# Named for the reader: both make a kernel slow without a word anywhere else. Any other warning fails as well.
KNOWN_WARNINGS = {
    "C7508": "setmaxnreg is ignored",
    "C7510": "wgmma instructions are serialized",
}
COMPILING = re.compile(r"Compiling entry function '(?P<kernel>[^']+)' for '(?P<architecture>[^']+)'")
SPILLS = re.compile(r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (?P<registers>\d+) registers")
WARNING = re.compile(r"ptxas.*\bwarning\b|\(C75(08|10)\)", re.IGNORECASE)
SILENT_MESSAGES = re.compile(r"wgmma\S* .*serializ|setmaxnreg.*ignored", re.IGNORECASE)


class Report(NamedTuple):
    kernels: int
    most_registers: int
    problems: list[str]


def check(text: str) -> Report:
    """What one log holds. Problems are sentences, one a line of the log."""
    kernels, most_registers = 0, 0
    problems: list[str] = []
    current = "unknown kernel"
    for line in text.splitlines():
        if match := COMPILING.search(line):
            current = f"{match['kernel']} for {match['architecture']}"
            kernels += 1
        if (match := SPILLS.search(line)) and (int(match["stores"]) or int(match["loads"])):
            problems.append(f"{current}: spills registers ({match['stores']} bytes stored, {match['loads']} loaded)")
        if match := REGISTERS.search(line):
            most_registers = max(most_registers, int(match["registers"]))
        if WARNING.search(line) or SILENT_MESSAGES.search(line):
            meaning = next((f" [{text}]" for code, text in KNOWN_WARNINGS.items() if code in line), "")
            problems.append(f"{current}: {line.strip()}{meaning}")
    return Report(kernels, most_registers, problems)


def cuda_objects(build: Path) -> list[Path]:
    commands = json.loads((build / "compile_commands.json").read_text())
    return sorted(Path(c["directory"]) / c["output"] for c in commands if c["file"].endswith(".cu"))


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or not (Path(arguments[0]) / "compile_commands.json").exists():
        print(__doc__, file=sys.stderr)
        return 2
    objects = cuda_objects(Path(arguments[0]))
    if not objects:
        print("check_ptxas: no CUDA objects, nothing to check")
        return 0
    kernels, most_registers, failed = 0, 0, False
    for compiled in objects:
        log = compiled.with_name(compiled.name + ".log")
        if not log.exists():
            print(f"check_ptxas: {compiled} has no log beside it; build it again")
            failed = True
            continue
        report = check(log.read_text())
        kernels += report.kernels
        most_registers = max(most_registers, report.most_registers)
        for problem in report.problems:
            print(f"check_ptxas: {compiled.name}: {problem}")
            failed = True
    if kernels == 0 and not failed:
        print("check_ptxas: the logs name no kernel: was ptxas run with -v?")
        failed = True
    print(f"check_ptxas: {kernels} kernels, at most {most_registers} registers: {'FAILED' if failed else 'ok'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
