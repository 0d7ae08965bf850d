"""collect-env prints its report whatever is broken."""

from __future__ import annotations

import io
import sys

import pytest
import torch

from marlin_qqq import _library, collect_env, ops

SECTIONS = ["marlin_qqq:", "system:", "torch:", "GPUs:", "self-test:", "packages:", "environment:"]


def headings(report: str) -> list[str]:
    return [line for line in report.splitlines() if not line.startswith(" ")]


def test_report_of_a_healthy_installation():
    report = collect_env.collect_env()
    assert headings(report) == SECTIONS
    assert f"version: {torch.__version__}" in report
    assert "  cpu: ok" in report
    assert "libmarlin_qqq.so: " in report and "sha256" in report
    assert "error" not in report


def test_environment_names_variables_but_no_secret(monkeypatch):
    monkeypatch.setenv("MARLIN_QQQ_TILE", "some_tile")
    monkeypatch.setenv("VLLM_API_KEY", "do-not-print")
    report = collect_env.collect_env()
    assert "MARLIN_QQQ_TILE: some_tile" in report
    assert "VLLM_API_KEY: (set)" in report
    assert "do-not-print" not in report


def test_a_wrong_result_is_shown(monkeypatch):
    monkeypatch.setattr(ops, "marlin_qqq_gemm", lambda *args: torch.zeros(3, 64))
    assert "cpu: WRONG RESULT: expected 128 everywhere, got [0.0" in collect_env.collect_env()


@pytest.mark.parametrize("section", ["_package", "_system", "_torch", "_gpus", "_self_test", "_packages", "_variables"])
def test_a_broken_section_is_one_line(monkeypatch, section):
    def broken():
        raise OSError("disk on fire")

    monkeypatch.setattr(collect_env, section, broken)
    report = collect_env.collect_env()
    assert headings(report) == SECTIONS
    assert "error: OSError: disk on fire" in report


def test_without_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    report = collect_env.collect_env()
    assert headings(report) == SECTIONS
    assert "ModuleNotFoundError" in report


def test_reason_for_missing_cuda_kernels_is_shown(monkeypatch):
    monkeypatch.setattr(_library, "cuda_unavailable_reason", "of a test")
    assert "CUDA kernels: not loaded: of a test" in collect_env.collect_env()


def test_command_line(capsys):
    from marlin_qqq.cli.collect_env import command

    command()
    assert headings(capsys.readouterr().out) == SECTIONS


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_letters_that_a_terminal_lacks_are_escaped(monkeypatch, encoding):
    """A name in another script, and bytes that are no text at all."""
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding=encoding))
    monkeypatch.setenv("MARLIN_QQQ_TILE", "caf\u00e9 \udcff")
    collect_env.print_report()
    sys.stdout.flush()
    shown = "caf\\xe9" if encoding == "ascii" else "caf\u00e9"
    assert f"MARLIN_QQQ_TILE: {shown} \\udcff" in written.getvalue().decode(encoding)
