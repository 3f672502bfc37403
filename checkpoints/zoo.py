"""Where the bundled pipelines and predictors are, and what a name stands for."""

import importlib.util
from pathlib import Path

from ..errors import meant

ZOO = Path(__file__).resolve().parent / "zoo"
"""Folder of the bundled pipelines and predictors."""

APART = (
    "emoji_flux",
    "emoji_flux_disca_8",
    "emoji_flux_l2p_11",
    "emoji_flux_l2p_8",
    "emoji_flux_lesa_8",
    "emoji_flux_readout_11",
    "emoji_flux_readout_4",
    "emoji_flux_readout_6",
    "emoji_flux_readout_8",
    "emoji_wan",
    "fashion_dit_student",
    "fashion_dit_student_disca",
)
"""Those that are in a package of their own: foreseer's wheel would be too large with them."""

APART_PACKAGE = "foreseer_zoo"


def bundled() -> dict[str, Path]:
    """Folders by name: of a checkout all, of an installed foreseer those that were installed."""
    places = [ZOO]
    found = importlib.util.find_spec(APART_PACKAGE)
    if found is not None and found.origin is not None:
        places.insert(0, Path(found.origin).parent / "zoo")
    folders = [folder for place in places for folder in place.glob("*") if folder.is_dir()]
    return {folder.name: folder for folder in sorted(folders, key=lambda folder: folder.name)}


def resolve(name: str) -> Path:
    """The folder a name stands for: a path, or a bundled one such as `zoo:fashion_dit`.

    Raises:
        FileNotFoundError: nothing is there; the message lists what is bundled.
    """
    known = bundled()
    folder, entry = Path(name), name.removeprefix("zoo:")
    if entry != name and entry in known:
        return known[entry]
    if entry == name and folder.is_dir():
        return folder
    if entry != name and entry in APART:
        raise FileNotFoundError(
            f"{name} is in the package foreseer-zoo, which is not installed: "
            'pip install "foreseer[zoo]", or work in a checkout.'
        )
    names = [f"zoo:{each}" for each in known]
    near = meant(name, [*names, *beside(folder)])
    raise FileNotFoundError(f"no folder {name}; bundled are {', '.join(names) or 'none'}{near}")


def beside(folder: Path) -> list[str]:
    """The folders that lie where a folder was looked for."""
    place = folder.parent
    return (
        [str(each) for each in sorted(place.iterdir()) if each.is_dir()] if place.is_dir() else []
    )
