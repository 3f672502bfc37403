"""The folder that a predictor checkpoint may be written to."""

from pathlib import Path

from .config import CONFIG_FILE, CheckpointError

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
    folder = Path(folder)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file, expected a folder for the predictor.")
    foreign = sorted(
        each.name
        for each in folder.iterdir()
        if each.name not in OWN and not each.name.startswith(".") and each.suffix not in PICTURES
    )
    if foreign:
        named = ", ".join(foreign[:4]) + (", ..." if len(foreign) > 4 else "")
        raise CheckpointError(
            f"{folder} holds {named}, expected an empty folder, or that of a predictor, whose "
            "files are replaced; give the predictor a folder of its own."
        )
