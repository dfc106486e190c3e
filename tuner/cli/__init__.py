"""The commands: data on stdout, everything else on stderr, and exit codes that mean something."""

from tuner.cli.app import main

__all__ = ["main"]
