"""The `foreseer` command: a thin dispatcher over LightningCLI and jsonargparse."""

import sys


def main(argv: list[str] | None = None) -> None:
    """Run one sub-command.

    Args:
        argv: command-line words after the program name; `sys.argv[1:]` when None.
    """
    words = sys.argv[1:] if argv is None else argv
    if words and words[0] == "teacher":
        from lightning.pytorch.cli import LightningCLI

        LightningCLI(args=words[1:], save_config_kwargs={"overwrite": True})
