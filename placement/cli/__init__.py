"""The command ``moe-placement``: parses, calls, prints; everything else lives in the library."""

from placement.cli.app import main

__all__ = ["main"]
