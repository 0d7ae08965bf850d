"""Reads what ptxas said while CUDA files were compiled and fails on spills and warnings.

    python scripts/check_ptxas.py BUILD_FOLDER

keep_compiler_output.py leaves OBJECT.log beside every object that nvcc makes; compile_commands.json says which objects
the build has now. A build without CUDA has none, which is reported and is no failure; a missing log is one.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

COMPILING = re.compile(r"Compiling entry function '(?P<kernel>[^']+)' for '(?P<architecture>[^']+)'")
SPILLS = re.compile(r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (?P<registers>\d+) registers")
# Warnings proper, and two losses that ptxas reports as mere information: wgmma serialised (C7510, C7512 and kin),
# setmaxnreg ignored (C7508). Either costs a kernel much of its speed.
WARNING = re.compile(r"ptxas.*\bwarning\b|\(C75\d\d\)|wgmma.*serializ|setmaxnreg.*ignored", re.IGNORECASE)


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
        if WARNING.search(line):
            problems.append(line.strip())
        elif (match := SPILLS.search(line)) and (int(match["stores"]) or int(match["loads"])):
            problems.append(f"{current} spills registers: {match['stores']} bytes stored, {match['loads']} loaded")
        if match := REGISTERS.search(line):
            most_registers = max(most_registers, int(match["registers"]))
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
