"""One file per command of ``cupy-mla``; cli.py puts them together."""
