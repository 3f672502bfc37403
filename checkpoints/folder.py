"""The folder that a predictor checkpoint may be written to."""

import os
from collections.abc import Sequence
from pathlib import Path

from foreseer.checkpoints.config import CONFIG_FILE, CheckpointError

MODEL_FILE = "model.safetensors"
CARD_FILE = "README.md"
GRAMS_FILE = "grams.safetensors"
SEGMENTS_FILE = "segments.safetensors"  # the normal equations of a readout
OWN = (MODEL_FILE, CONFIG_FILE, CARD_FILE, GRAMS_FILE, SEGMENTS_FILE)
PICTURES = (".png", ".jpg", ".webp")
"""Endings of what a card may show."""


def check_free(folder: str | Path) -> None:
    """Raise unless a folder is new, empty or an older predictor's.

    Hidden files, and pictures for the card, may lie in it.

    Raises:
        CheckpointError: it holds anything else, such as a recording, or is a file.
    """
    check_holds(Path(folder), OWN)


def check_holds(folder: Path, names: Sequence[str]) -> None:
    """Raise unless a folder is new, or holds nothing but these, hidden files and pictures.

    Raises:
        CheckpointError: it holds anything else, or is a file.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file, expected a folder for the predictor.")
    foreign = sorted(
        each.name
        for each in folder.iterdir()
        if each.name not in names and not each.name.startswith(".") and each.suffix not in PICTURES
    )
    if foreign:
        named = ", ".join(foreign[:4]) + (", ..." if len(foreign) > 4 else "")
        raise CheckpointError(
            f"{folder} holds {named}, expected an empty folder, or that of a predictor, whose "
            "files are replaced; give the predictor a folder of its own."
        )


def replace_file(path: Path, content: bytes) -> None:
    """Write a file in one go; a reader sees the old one or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    with open(partial, "xb") as file:  # never through a link that lies there
        file.write(content)
    os.replace(partial, path)
