"""Where the bundled pipelines and predictors are, and what a name stands for."""

from pathlib import Path

ZOO = Path(__file__).resolve().parent / "zoo"
"""Folder of the bundled pipelines and predictors."""


def resolve(name: str) -> Path:
    """The folder a name stands for: a path, or a bundled one such as `zoo:fashion_dit`.

    Raises:
        FileNotFoundError: nothing is there; the message lists what is bundled.
    """
    bundled = sorted(path.name for path in ZOO.glob("*") if path.is_dir())
    if name.startswith("zoo:"):
        found = name.removeprefix("zoo:") in bundled
        folder = ZOO / name.removeprefix("zoo:")
    else:
        folder = Path(name)
        found = folder.is_dir()
    if not found:
        names = ", ".join(f"zoo:{entry}" for entry in bundled)
        raise FileNotFoundError(f"no folder {folder}; bundled are {names or 'none'}.")
    return folder
