"""The check on ptxas's output finds what it is there for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from repository import load_script

check_ptxas = load_script("scripts/check_ptxas.py")

CLEAN = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z6kernelv' for 'sm_90a'
ptxas info    : Function properties for _Z6kernelv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers
"""
SPILLING = CLEAN.replace("0 bytes spill stores, 0 bytes", "8 bytes spill stores, 12 bytes")
SERIALIZED = CLEAN + (
    "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to "
    "non wgmma instructions defining accumulator registers of a wgmma between start and end of the pipeline stage\n"
)
IGNORED = (
    CLEAN + "ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored to maintain minimum registers\n"
)
WARNED = (
    CLEAN + "ptxas /tmp/kernel.ptx, line 20; warning : Registers are spilled to local memory in function '_Z6kernelv'\n"
)


def run(folder: Path, logs: dict[str, str | None]) -> int:
    commands = [{"directory": str(folder), "file": "main.cpp", "output": "main.cpp.o"}]
    for name, text in logs.items():
        commands.append({"directory": str(folder), "file": f"{name}.cu", "output": f"{name}.cu.o"})
        if text is not None:
            (folder / f"{name}.cu.o.log").write_text(text)
    (folder / "compile_commands.json").write_text(json.dumps(commands))
    return check_ptxas.main([str(folder)])


def test_clean_build_passes(tmp_path, capsys):
    assert run(tmp_path, {"one": CLEAN, "two": CLEAN * 2}) == 0
    assert "3 kernels, at most 168 registers: ok" in capsys.readouterr().out


@pytest.mark.parametrize(
    "log, text",
    [
        (SPILLING, "_Z6kernelv for sm_90a spills registers: 8 bytes stored, 12 loaded"),
        (SERIALIZED, "instructions are serialized"),
        (IGNORED, "'setmaxnreg' ignored"),
        (WARNED, "Registers are spilled"),
    ],
)
def test_problem_fails(tmp_path, capsys, log, text):
    assert run(tmp_path, {"good": CLEAN, "bad": log}) == 1
    out = capsys.readouterr().out
    assert text in out
    assert out.startswith("check_ptxas: bad.cu.o: ")
    assert "good.cu.o" not in out


@pytest.mark.parametrize("log", [None, "", "nothing about kernels\n"])
def test_missing_report_fails(tmp_path, log):
    assert run(tmp_path, {"one": log}) == 1


def test_logs_of_former_sources_do_not_count(tmp_path):
    (tmp_path / "old.cu.o.log").write_text(SPILLING)
    assert run(tmp_path, {"one": CLEAN}) == 0


def test_build_without_cuda_passes(tmp_path):
    assert run(tmp_path, {}) == 0


def test_no_build_folder_is_an_error(tmp_path):
    assert check_ptxas.main([str(tmp_path / "missing")]) == 2
