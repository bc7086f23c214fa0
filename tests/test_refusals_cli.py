"""Every option of every command, with a value that is wrong: exit code 2, and a line that names the option."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from cupy_mla.cli import main

# Of an option's kind, what it does not take.
WRONG_NUMBERS = ("x", "1.5", "-1")
WRONG_FLOATS = ("x", "nan,", "-1")
# Options whose values are checked further on, with values that are wrong there.
WRONG_VALUES: dict[tuple[str, str], list[list[str]]] = {
    ("decode", "--input"): [["/nowhere/case.npz"], ["case.txt"]],
    ("decode", "--save"): [["/nowhere/result.npz"], ["result.txt"]],
    ("decode", "--lengths"): [["/nowhere/lengths.csv"]],
    ("bench", "--lengths"): [["/nowhere/lengths.csv"]],
    ("plan", "--lengths"): [["/nowhere/lengths.csv"]],
}
# Flags, texts that may be anything, and what is checked elsewhere.
FREE = {"--help", "--version"}


def options() -> list[Any]:
    return [
        pytest.param(name, option, id=f"{name} {option.opts[0]}")
        for name, command in sorted(main.commands.items())
        for option in command.params
        if isinstance(option, click.Option) and not option.is_flag and option.opts[0] not in FREE
    ]


def wrong_values(command: str, option: click.Option) -> list[list[str]]:
    kind = option.type
    if isinstance(kind, click.Choice):
        return [["neither"]]
    if isinstance(kind, click.IntRange):
        return [[value] for value in WRONG_NUMBERS] + [[str(kind.max + 1)] for _ in range(kind.max is not None)]
    if kind is click.INT:
        return [["x"], ["1.5"]]
    if kind is click.FLOAT or isinstance(kind, click.FloatRange):
        return [[value] for value in WRONG_FLOATS[:2]]
    return WRONG_VALUES.get((command, option.opts[0]), [])


@pytest.mark.timeout(30)
@pytest.mark.parametrize(("command", "option"), options())
def test_a_wrong_value_is_named(
    command: str, option: click.Option, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for value in wrong_values(command, option):
        result = CliRunner().invoke(main, [command, option.opts[0], *value])
        assert result.exit_code == 2, result.output
        assert result.stdout == ""
        last = result.stderr.strip().splitlines()[-1]
        assert last.startswith("Error: ")
        assert option.opts[0] in last
        assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", sorted(main.commands))
def test_what_there_is_not_is_named(command: str) -> None:
    for arguments in (["--no-such-option"], ["--no-such-option=3"]):
        result = CliRunner().invoke(main, [command, *arguments])
        assert result.exit_code == 2
        assert "--no-such-option" in result.stderr.splitlines()[-1]


def test_an_unknown_command_is_named() -> None:
    result = CliRunner().invoke(main, ["decoed"])
    assert result.exit_code == 2
    assert "decoed" in result.stderr.splitlines()[-1]
