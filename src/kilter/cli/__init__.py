"""The command line. `kilter --help` loads no torch; each command imports what it needs inside its function."""

from kilter.cli.main import main

__all__ = ["main"]
