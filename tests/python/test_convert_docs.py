"""Every command and Python block of docs/convert.md and docs/transformers.md runs, in order, on the demo model."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from repository import ROOT
from typer.testing import CliRunner

from marlin_qqq.cli.app import app

# Set-up that every test environment has been through already.
DONE_BEFORE = ('pip install ".[transformers]"',)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("page", ["convert.md", "transformers.md"])
def test_page_from_nothing_to_an_answer(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("demo", "python"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```(bash|python)\n(.*?)^```", (ROOT / "docs" / page).read_text(), re.S | re.M)
    assert {language for language, _ in blocks} == {"bash", "python"}
    variables: dict = {}
    for language, text in blocks:
        if language == "python":
            exec(compile(text, page, "exec"), variables)
            continue
        for line in text.splitlines():
            run_line(line)
    if page == "transformers.md":
        assert "def read_file(path):" in capsys.readouterr().out
        first, again = (Path(name, "model.safetensors").read_bytes() for name in ("demo-qqq", "demo-again"))
        assert len(first) == len(again)


def run_line(line: str) -> None:
    if line in DONE_BEFORE:
        return
    words = shlex.split(line)
    if words[0] == "marlin-qqq":
        # In this process: importing torch and transformers anew for each command would take most of the time.
        result = CliRunner().invoke(app, words[1:])
        assert result.exit_code == 0, f"{line}\n{result.output}"
    else:
        subprocess.run(line, shell=True, check=True)
