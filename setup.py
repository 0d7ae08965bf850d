"""Packaging: everything static is in pyproject.toml; this file has CMake build the libraries into the package.

CMAKE_ARGS in the environment is passed on, e.g. CMAKE_ARGS="-DMARLIN_QQQ_CUDA=OFF"; MAX_JOBS bounds parallel compilers.
"""

import fcntl
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Configures and builds CMakeLists.txt. The build folder is kept, so that a second run compiles what changed."""

    def run(self) -> None:
        # In place (editable installs): the source package. Else: the copy of the package that becomes the wheel.
        output = ROOT / "python" if self.inplace else Path(self.build_lib).resolve()
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}{'' if self.inplace else '-wheel'}"
        build.mkdir(parents=True, exist_ok=True)
        with open(build / "setup.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two builds in one folder would trample each other
            self._cmake(build, output / "marlin_qqq")

    def _cmake(self, build: Path, output: Path) -> None:
        # The programs of the environment that runs this (build requirements), else the system's.
        search = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        cmake, ninja = shutil.which("cmake", path=search), shutil.which("ninja", path=search)
        if cmake is None:
            raise SystemExit("setup.py: cmake was not found; `pip install cmake ninja` gets it")
        configure = [cmake, "-S", str(ROOT), "-B", str(build), f"-DPython_EXECUTABLE={sys.executable}"]
        configure += [f"-DMARLIN_QQQ_OUTPUT_DIR={output}", "-DCMAKE_BUILD_TYPE=Release"]
        if ninja is not None:
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        # CMake remembers answers: a torch that has moved (pip's build environments do) must be looked up again.
        configure += ["-UMARLIN_QQQ_TORCH_DIR", "-Upybind11_DIR", *shlex.split(os.environ.get("CMAKE_ARGS", ""))]
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build), "--parallel", jobs], check=True)

    def get_outputs(self) -> list[str]:
        return []

    def get_source_files(self) -> list[str]:
        return []


# The extension stands for the libraries that CMake makes. Its presence gives the wheel the tag of this CPython and
# platform, which is right: _introspection is built for one CPython, though the op libraries would serve any.
setup(ext_modules=[Extension("marlin_qqq._introspection", sources=[])], cmdclass={"build_ext": CMakeBuild})
