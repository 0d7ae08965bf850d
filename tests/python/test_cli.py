"""The `marlin-qqq` command itself: help, version, lazy subcommands, how errors look."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import types

import pytest
import typer
from typer.testing import CliRunner

from marlin_qqq.cli import app as cli_app

runner = CliRunner()


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, check=False)


def test_module_is_the_command() -> None:
    result = run_python("-m", "marlin_qqq", "--help")
    assert result.returncode == 0, result.stderr
    for name in cli_app.SUBCOMMANDS:
        assert name in result.stdout


def test_help_imports_no_subcommand_and_no_torch() -> None:
    script = (
        "import sys; sys.argv = ['marlin-qqq', '--help']\n"
        "from marlin_qqq.cli import main\n"
        "try: main()\n"
        "except SystemExit as status: assert status.code in (0, None), status.code\n"
        "loaded = [m for m in sys.modules if m.split('.')[0] in ('torch', 'transformers', 'numpy')\n"
        "          or m.startswith('marlin_qqq.cli.') and m != 'marlin_qqq.cli.app']\n"
        "assert not loaded, loaded\n"
    )
    result = run_python("-c", script)
    assert result.returncode == 0, result.stderr


def test_version() -> None:
    result = runner.invoke(cli_app.app, ["--version"])
    assert result.exit_code == 0
    assert result.output.startswith("marlin-qqq ")


@pytest.mark.parametrize("name", list(cli_app.SUBCOMMANDS))
def test_each_subcommand_has_a_file_and_a_help(name: str) -> None:
    assert importlib.util.find_spec(f"marlin_qqq.cli.{name.replace('-', '_')}") is not None
    result = runner.invoke(cli_app.app, [name, "--help"])
    assert result.exit_code == 0, result.output
    assert f"marlin-qqq {name}" in result.output


def test_unknown_subcommand_and_unknown_option_are_usage_errors() -> None:
    assert runner.invoke(cli_app.app, ["convrt"]).exit_code == 2
    assert runner.invoke(cli_app.app, ["demo", "--no-such-option"]).exit_code == 2


@pytest.fixture
def fake_subcommand(monkeypatch: pytest.MonkeyPatch):
    """Puts a function in the place of `marlin-qqq demo`."""

    def install(function) -> None:
        module = types.ModuleType("marlin_qqq.cli.demo")
        module.command = function
        monkeypatch.setitem(sys.modules, "marlin_qqq.cli.demo", module)

    monkeypatch.delenv("MARLIN_QQQ_TRACEBACK", raising=False)
    return install


def test_errors_are_red_but_not_where_nobody_wants_colours(fake_subcommand, monkeypatch: pytest.MonkeyPatch) -> None:
    def command() -> None:
        raise ValueError("--width is 7; allowed: 8")

    fake_subcommand(command)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[31m" in runner.invoke(cli_app.app, ["demo"], color=True).output
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in runner.invoke(cli_app.app, ["demo"], color=True).output


@pytest.mark.parametrize("error", [cli_app.CliError, ValueError, FileNotFoundError, RuntimeError, ImportError])
def test_error_is_one_message_and_status_1(fake_subcommand, error: type[Exception]) -> None:
    def command() -> None:
        raise error("--width is 7; allowed: 8")

    fake_subcommand(command)
    result = runner.invoke(cli_app.app, ["demo"])
    assert result.exit_code == 1
    assert "marlin-qqq demo: --width is 7; allowed: 8" in result.stderr
    assert "Traceback" not in result.output
    # What the user can put right needs no pointer to the traceback.
    assert ("MARLIN_QQQ_TRACEBACK" in result.stderr) == (error not in (cli_app.CliError, ValueError))


def test_traceback_on_request(fake_subcommand, monkeypatch: pytest.MonkeyPatch) -> None:
    def command() -> None:
        raise ValueError("--width is 7; allowed: 8")

    fake_subcommand(command)
    monkeypatch.setenv("MARLIN_QQQ_TRACEBACK", "1")
    assert isinstance(runner.invoke(cli_app.app, ["demo"]).exception, ValueError)


def test_exit_status_and_arguments_reach_the_subcommand(fake_subcommand) -> None:
    def command(first: str, number: int = 0, flag: bool = False) -> None:
        typer.echo(f"{first} {number} {flag}")
        raise typer.Exit(number)

    fake_subcommand(command)
    result = runner.invoke(cli_app.app, ["demo", "word", "--number", "3", "--flag"])
    assert (result.exit_code, result.output) == (3, "word 3 True\n")
