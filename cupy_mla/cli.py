"""The ``cupy-mla`` command. Exit codes: 0 all is well, 1 a check failed, 2 a user's mistake, 3 it cannot run here."""

from __future__ import annotations

import click

from . import __version__
from .commands.bench import bench
from .commands.cache import cache
from .commands.check import check
from .commands.command import Commands
from .commands.compile import compile_kernels
from .commands.decode import decode
from .commands.info import info
from .commands.memory import memory
from .commands.plan import plan


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """MLA decoding on Hopper GPUs: run it, check it, and see what it does.

    Start with "cupy-mla decode": it decodes a batch of real request lengths on the best backend of this machine.

    Exit codes: 0 all is well, 1 a check failed, 2 wrong arguments, 3 it cannot run on this machine.
    """


for _command in (decode, info, check, compile_kernels, plan, bench, memory, cache):
    main.add_command(_command)
