"""Disassembles the Hopper kernels and fails where ptxas took a warp for divergent that is not.

    python scripts/check_sass.py BUILD_FOLDER

Two signs, neither of which ptxas reports. A copy that stands behind anything but elect.sync becomes a loop over the
warp's threads (`BRA.U.ANY`). And the addresses of a mainloop move to registers of threads, from where every product
and copy fetches them anew (`R2UR` within the loop of products, above all of their descriptors): 7 % of the time of some
tiles.

cuobjdump is CUDA's, or the one that comes with the package triton, which torch needs.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from check_ptxas import cuda_objects

FUNCTION = re.compile(r"Function : (\S+)")
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);")
# One that closes a loop has a predicate. Without, it returns to where a wait that took longer left the straight way.
BRANCH = re.compile(r"^@\S+ +BRA\b.*?(0x[0-9a-f]+)")
PRODUCT = re.compile(r"\bIG?MMA\b")
MOVE = re.compile(r"\bR2UR\S*\s+UR(\d+)")
DESCRIPTOR = re.compile(r"\bgdesc\[UR(\d+)\]")
# What the barriers, targets and coordinates of copies may need where a stage is filled again, which warpgroups do in
# two places.
MOST_MOVES = 5

Code = list[tuple[int, str]]  # address, instruction


def functions(sass: str) -> dict[str, Code]:
    """The code of every function in cuobjdump's output."""
    found: dict[str, Code] = {}
    code: Code = []
    for line in sass.splitlines():
        if match := FUNCTION.search(line):
            code = found.setdefault(match[1], [])
        elif match := INSTRUCTION.match(line):
            code.append((int(match[1], 16), match[2]))
    return found


def product_loop(code: Code) -> Code:
    """The smallest loop that multiplies; empty if there is none."""
    loops = []
    for address, instruction in code:
        if (match := BRANCH.search(instruction)) and (start := int(match[1], 16)) < address:
            loop = [(at, text) for at, text in code if start <= at <= address]
            if any(PRODUCT.search(text) for _, text in loop):
                loops.append(loop)
    return min(loops, key=len, default=[])


def check(sass: str) -> tuple[int, list[str]]:
    """How many kernels with products the text holds, and what is wrong with them."""
    kernels = 0
    problems: list[str] = []
    for name, code in functions(sass).items():
        if not any(PRODUCT.search(text) for _, text in code):
            continue
        kernels += 1
        if loops := sum("BRA.U.ANY" in text for _, text in code):
            problems.append(f"{name} copies in {loops} loops over a warp's threads: put elect_thread() before the copy")
        loop = product_loop(code)
        moves = [int(match[1]) for _, text in loop if (match := MOVE.search(text))]
        descriptors = {int(match[1]) + i for _, text in loop for match in DESCRIPTOR.finditer(text) for i in (0, 1)}
        if not loop:
            problems.append(f"{name} has no loop of products: is this script's idea of a loop still right?")
        elif descriptors.intersection(moves):
            problems.append(f"{name} moves descriptors of products from registers of threads (R2UR) in their loop")
        elif len(moves) > MOST_MOVES:
            problems.append(f"{name} has {len(moves)} R2UR in its loop of products, {MOST_MOVES} at most are expected")
    return kernels, problems


def cuobjdump() -> str:
    if path := shutil.which("cuobjdump"):
        return path
    spec = importlib.util.find_spec("triton")
    for folder in spec.submodule_search_locations or [] if spec else []:
        path = Path(folder) / "backends" / "nvidia" / "bin" / "cuobjdump"
        if path.exists():
            return str(path)
    raise SystemExit("check_sass: needs cuobjdump, of the CUDA toolkit or of the package triton; neither is installed")


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or not (Path(arguments[0]) / "compile_commands.json").exists():
        print(__doc__, file=sys.stderr)
        return 2
    objects = [path for path in cuda_objects(Path(arguments[0])) if "sm90" in path.parts]
    if not objects:
        print("check_sass: no Hopper objects, nothing to check")
        return 0
    tool = cuobjdump()

    def disassembled(path: Path) -> tuple[int, list[str]]:
        return check(subprocess.run([tool, "-sass", path], check=True, capture_output=True, text=True).stdout)

    with ThreadPoolExecutor() as pool:
        reports = list(pool.map(disassembled, objects))
    kernels = sum(count for count, _ in reports)
    problems = [f"{path.name}: {text}" for path, (_, texts) in zip(objects, reports, strict=True) for text in texts]
    if kernels == 0:
        problems.append("no kernel multiplies: were the objects built for sm_90a?")
    for problem in problems:
        print(f"check_sass: {problem}")
    print(f"check_sass: {kernels} kernels: {'FAILED' if problems else 'ok'}")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
