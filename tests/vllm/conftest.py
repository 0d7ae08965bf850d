"""Tests of the vLLM plug-in; they need vLLM and an installed marlin_qqq: `make test-vllm` sets both up."""

from __future__ import annotations

import os

import pytest
from engine import ENVIRONMENT

# Before vLLM is imported: it reads these once.
os.environ.update(ENVIRONMENT)


@pytest.fixture(scope="session", autouse=True)
def vllm_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Caches of compiled code of this run only, also for the engines that the tests start."""
    os.environ["VLLM_CACHE_ROOT"] = str(tmp_path_factory.mktemp("vllm-cache"))
