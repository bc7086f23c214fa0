"""How every command ends: with a result, or with one line that says what is wrong in the words that were typed."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import click
from click.core import ParameterSource

from ..errors import InvalidArgumentError, MlaError


class UserMistake(click.ClickException):
    """Shown as one line; the option's name is in it."""

    exit_code = 2


class CannotRun(click.ClickException):
    """No GPU, no compiler, not enough memory: nothing that another argument would mend."""

    exit_code = 3


class _Ending(click.Command):
    def main(self, *arguments: Any, **options: Any) -> Any:
        with _output():
            return super().main(*arguments, **options)


class Commands(_Ending, click.Group):
    """A group of commands."""


class Command(_Ending):
    """A command that turns this package's errors into one line instead of a traceback.

    Parameters
    ----------
    spellings
        Options by the argument of a function that they become, where that has another name.
    """

    def __init__(self, *arguments: Any, spellings: Mapping[str, str] | None = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._spellings = spellings or {}

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except InvalidArgumentError as error:
            name = self._option_of(error.argument, ctx)
            raise UserMistake(name + str(error).removeprefix(error.argument)) from error
        except MlaError as error:
            raise CannotRun(str(error)) from error
        except MemoryError as error:  # NumPy's and CuPy's own are kinds of it
            raise CannotRun(f"not enough memory for this case: {error}") from error

    def _option_of(self, argument: str, ctx: click.Context) -> str:
        """The option that an argument came from, if it was typed; else the argument, which is in a file perhaps."""
        wanted = self._spellings.get(argument, "--" + argument.replace("_", "-"))
        for parameter in self.params:
            typed = ctx.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
            if typed and wanted in parameter.opts:
                return wanted
        return argument


@contextlib.contextmanager
def _output() -> Iterator[None]:
    """Characters that the output's encoding has not are escaped; an output that takes nothing ends in one line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except OSError as error:  # of a closed pipe click makes an end by itself
        with contextlib.suppress(OSError):
            click.echo(f"Error: {error}", err=True)
        for stream in (sys.stdout, sys.stderr):
            _forget_unwritten(stream)
        sys.exit(CannotRun.exit_code)


def _forget_unwritten(stream: Any) -> None:
    """Python would try once more to write it when it ends, and print what came of that."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
