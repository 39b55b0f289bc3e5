"""The command `dptrain`."""

from dptrain.cli.dispatch import main

__all__ = ["main"]
