"""The commands: they print data on stdout and everything else on stderr; the one room that imports launchers."""

from tuner.cli.app import main

__all__ = ["main"]
