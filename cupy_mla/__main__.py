"""``python -m cupy_mla``: the ``cupy-mla`` command, for where its script is not on the PATH."""

from .cli import main

main(prog_name="python -m cupy_mla")
