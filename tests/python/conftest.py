"""Shared by all Python tests: GPU tests are skipped where there is no GPU, and a failure shows its random seed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Read when torch loads its OpenMP: threads sleep at barriers in place of spinning, which on a busy machine (a CI
# runner) makes small tensor operations tens of times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def pytest_report_header(config: pytest.Config) -> str:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return f"torch {torch.__version__}, GPU: {gpu}, threads: {torch.get_num_threads()}"


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For models so small that a second thread costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tiny float model's Hugging Face folder, for the converter."""
    from folders import save_float_folder  # needs transformers, which the op tests do without

    save_float_folder(tmp_path / "float")
    return tmp_path / "float"
