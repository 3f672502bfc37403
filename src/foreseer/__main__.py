"""Run the command line as `python -m foreseer`."""

from .cli import main

main()
