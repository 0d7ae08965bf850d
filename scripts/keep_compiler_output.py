"""Compile-rule launcher: runs the compiler, keeps what it printed in OBJECT.log, prints only on failure.

Usage: keep_compiler_output.py OBJECT COMMAND...
"""

import subprocess
import sys


def main() -> int:
    object_file, command = sys.argv[1], sys.argv[2:]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with open(object_file + ".log", "w") as log:
        log.write(result.stdout)
    if result.returncode != 0:
        sys.stdout.write(result.stdout)
    return result.returncode


if __name__ == "__main__":
    sys.exit(main())
