"""Run the command as ``python -m placement.cli``."""

from placement.cli.app import main

main()
