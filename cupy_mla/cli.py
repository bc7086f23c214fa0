"""The ``cupy-mla`` command. Exit codes: 0 all is well, 1 a check failed, 2 a user's mistake, 3 it cannot run here."""

from __future__ import annotations

from typing import Any

import click

from . import __version__
from .commands.bench import bench
from .commands.check import check
from .commands.compile import compile_kernels
from .commands.decode import decode
from .commands.info import info
from .commands.memory import memory
from .commands.plan import plan
from .errors import InvalidArgumentError, MlaError


class UserMistake(click.ClickException):
    """Shown as one line; the argument's name is in it."""

    exit_code = 2


class CannotRun(click.ClickException):
    """No GPU, no compiler, not enough memory: nothing that another argument would mend."""

    exit_code = 3


class _Commands(click.Group):
    """A group that turns this package's errors into one line instead of a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except InvalidArgumentError as error:
            raise UserMistake(str(error)) from error
        except MlaError as error:
            raise CannotRun(str(error)) from error
        except MemoryError as error:  # NumPy's and CuPy's own are kinds of it
            raise CannotRun(f"not enough memory for this case: {error}") from error


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """MLA decoding on Hopper GPUs: run it, check it, and see what it does.

    Start with "cupy-mla decode": it decodes a batch of real request lengths on the best backend of this machine.

    Exit codes: 0 all is well, 1 a check failed, 2 wrong arguments, 3 it cannot run on this machine.
    """


for _command in (decode, info, check, compile_kernels, plan, bench, memory):
    main.add_command(_command)
