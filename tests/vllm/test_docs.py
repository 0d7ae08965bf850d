"""docs/vllm.md, followed from top to bottom: every command of the page runs here, and the server is asked."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import exact_model
import pytest
import torch
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "vllm.md").read_text()
# What scripts/test_vllm.py and engine.py have done for this environment: the only commands that do not run here.
DONE_BEFORE = ['pip install ".[vllm]"', "export VLLM_CPU_KVCACHE_SPACE=1"]


def blocks(language: str) -> list[str]:
    return [text.strip() for text in re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the reader is: a folder that looks like this repository's."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "demo").mkdir()
    shutil.copytree(ROOT / "demo" / "model", folder / "demo" / "model")
    return folder


@contextlib.contextmanager
def server(command: str, folder: Path, port: int) -> Iterator[None]:
    """Runs `vllm serve ...` until the body is done; the body starts when the server answers."""
    with (folder / "server.log").open("w") as log:
        names = dict(os.environ, VLLM_LOGGING_LEVEL="INFO")
        process = subprocess.Popen(command.split(), cwd=folder, stdout=log, stderr=subprocess.STDOUT, env=names)
        try:
            deadline = time.monotonic() + 400
            while True:
                with contextlib.suppress(urllib.error.URLError, ConnectionError):
                    urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5).close()
                    break
                text = (folder / "server.log").read_text()
                assert process.poll() is None and time.monotonic() < deadline, f"no server:\n{text[-6000:]}"
                time.sleep(0.5)
            yield
        finally:
            process.terminate()
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()


def reference_text(folder: Path, prompt: str, num_tokens: int) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = exact_model.load(folder, torch.float16)
    (continuation,) = exact_model.continue_greedily(model, [tokenizer(prompt)["input_ids"]], num_tokens)
    assert continuation.margin > 0.2, "the page's prompt is too close a call to be compared"
    return tokenizer.decode(continuation.tokens)


def test_page(folder: Path):
    assert [line for text in blocks("sh") for line in text.splitlines()] == DONE_BEFORE
    make, serve, ask = blocks("bash")
    (script,) = blocks("python")

    subprocess.run(["bash", "-euc", make], cwd=folder, check=True)
    expected = reference_text(folder / "demo-qqq", "if __name__ ==", 8)

    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    assert "--port 8000" in serve and "localhost:8000" in ask
    with server(serve.replace("8000", str(port)), folder, port):
        answer = subprocess.check_output(["bash", "-euc", ask.replace("8000", str(port))], cwd=folder, text=True)
    assert json.loads(answer)["choices"][0]["text"] == expected
    for promised in ("quantization=qqq", "Application startup complete"):
        assert promised in (folder / "server.log").read_text()

    (folder / "offline.py").write_text(script)
    printed = subprocess.check_output([sys.executable, "offline.py"], cwd=folder, text=True)
    assert expected in printed
