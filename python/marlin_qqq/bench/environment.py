"""Where a run was made: what a reader needs to judge its numbers, and the clocks while it ran."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import shlex
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from marlin_qqq._version import __version__

_NVIDIA_SMI_FIELDS = ("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit", "clocks.sm")


def describe_environment(device: str, command: list[str] | None = None) -> dict[str, Any]:
    """GPU, driver, torch, commit, clocks and command line. Fields that cannot be found are None, never an error."""
    import torch

    environment: dict[str, Any] = {
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]] if command is None else command),
        "device": device,
        "host": {
            "cpu": _cpu_name(),
            "num_threads": torch.get_num_threads(),
            "system": platform.system(),
            "machine": platform.machine(),
        },
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "marlin_qqq": __version__,
        **_git_state(),
    }
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        environment["gpu"] = {
            "name": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "num_sms": properties.multi_processor_count,
            "l2_bytes": l2_bytes(device),
            "memory_bytes": properties.total_memory,
            **_nvidia_smi(torch.device(device).index or 0),
        }
    return environment


def describe_device(environment: dict[str, Any]) -> str:
    """One short name for titles: the GPU's, else the CPU's with its threads."""
    if "gpu" in environment:
        return str(environment["gpu"].get("name", "GPU"))
    host = environment.get("host", {})
    return f"{host.get('cpu', 'CPU')}, {host.get('num_threads', '?')} threads"


def l2_bytes(device: str) -> int:
    """L2 of the GPU; for a CPU 0 (its copies only have to differ)."""
    if not device.startswith("cuda"):
        return 0
    import torch

    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "L2_cache_size", 0) or 64 * 2**20)


class ClockReading:
    """SM clock and power of a stretch of work: medians of what was sampled while it ran."""

    def __init__(self) -> None:
        self.clocks: list[float] = []
        self.powers: list[float] = []

    @property
    def sm_clock_mhz(self) -> float | None:
        return statistics.median(self.clocks) if self.clocks else None

    @property
    def power_w(self) -> float | None:
        return statistics.median(self.powers) if self.powers else None


class ClockSampler:
    """Samples SM clock and power through NVML in a thread; without NVML its readings are empty."""

    def __init__(self, device_index: int = 0, interval_seconds: float = 0.01) -> None:
        self._interval = interval_seconds
        self._nvml: Any = None
        self._handle: Any = None
        try:
            import pynvml

            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByIndex(_physical_index(device_index))
            self._nvml = pynvml
        except Exception:  # the package, the driver or the permission is missing: clocks stay unknown
            self._nvml = None

    @contextlib.contextmanager
    def __call__(self) -> Iterator[ClockReading]:
        reading = ClockReading()
        if self._nvml is None:
            yield reading
            return
        stop = threading.Event()

        def sample() -> None:
            time.sleep(self._interval)  # the first moments still show the clock of the work before
            while not stop.is_set():
                with contextlib.suppress(Exception):
                    reading.clocks.append(float(self._nvml.nvmlDeviceGetClockInfo(self._handle, 1)))
                    reading.powers.append(self._nvml.nvmlDeviceGetPowerUsage(self._handle) / 1e3)
                stop.wait(self._interval)

        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        try:
            yield reading
        finally:
            stop.set()
            thread.join()


def _physical_index(device_index: int) -> int:
    """NVML counts all GPUs of the machine, torch those that CUDA_VISIBLE_DEVICES leaves."""
    visible = [entry.strip() for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if entry.strip()]
    if device_index < len(visible) and visible[device_index].isdigit():
        return int(visible[device_index])
    return device_index


def _nvidia_smi(device_index: int) -> dict[str, Any]:
    query = [
        "nvidia-smi",
        f"--query-gpu={','.join(_NVIDIA_SMI_FIELDS)}",
        "--format=csv,noheader,nounits",
        "-i",
        str(_physical_index(device_index)),
    ]
    values = [value.strip() for value in _run(query).split(",")]
    if len(values) != len(_NVIDIA_SMI_FIELDS):
        values = [""] * len(_NVIDIA_SMI_FIELDS)
    driver, max_sm, max_memory, power, sm = (value or None for value in values)
    return {
        "driver": driver,
        "max_sm_clock_mhz": max_sm,
        "max_memory_clock_mhz": max_memory,
        "power_limit_w": power,
        "sm_clock_mhz_at_start": sm,
    }


def _git_state() -> dict[str, Any]:
    """Commit of the source tree this package is imported from; an installed wheel or a copy without .git has none.

    MARLIN_QQQ_COMMIT says it for such a copy.
    """
    if stated := os.environ.get("MARLIN_QQQ_COMMIT"):
        return {"commit": stated, "uncommitted_changes": None}
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return {"commit": None, "uncommitted_changes": None}
    commit = _run(["git", "-C", str(root), "rev-parse", "HEAD"]).strip() or None
    changes = _run(["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"])
    return {"commit": commit, "uncommitted_changes": bool(changes.strip()) if commit else None}


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _run(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
