"""What all figures look alike in: hues for light and dark pages, letters, margins.

Figures are drawn in the light hues; a page exchanges them for its own variables of the same names.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

HUES = {  # name: on light pages and in PNG files, on dark pages
    "ink": ("#16191d", "#e9ecef"),
    "soft": ("#555e6a", "#a7b0bb"),
    "grid": ("#e4e7ec", "#2b323b"),
    "card": ("#ffffff", "#191d22"),
    "warm0": ("#cc5500", "#ff8a3d"),
    "warm1": ("#b4508a", "#f0a3cc"),
    "warm2": ("#a87400", "#f5bd4f"),
    "warm3": ("#8a3b12", "#e0976b"),
    "warm4": ("#7b2d6b", "#cf9cf0"),
    "cold0": ("#0072b2", "#5db4f0"),
    "cold1": ("#00805d", "#3fd0a0"),
    "cold2": ("#2e8fcb", "#a5daff"),
    "cold3": ("#1b3a5c", "#93a8ff"),
    "grey0": ("#4c5157", "#d6dade"),
    "grey1": ("#8b9096", "#98a1ab"),
    "grey2": ("#696e74", "#b8bec5"),
    "grey3": ("#a0a4a9", "#7a838d"),
}
WARM, COLD, GREYS = (
    [light for name, (light, _) in HUES.items() if name.startswith(kind)]
    for kind in ("warm", "cold", "grey")
)
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (5, 1.5, 1, 1.5)), (0, (8, 2)))
# Weights: 0 is no colour at all, so one picture suits light and dark pages.
SIGNED = (
    (0.0, ("#0b5fa5", 1.0)),
    (0.3, ("#2e8fcb", 0.6)),
    (0.5, ("#2e8fcb", 0.0)),
    (0.5, ("#ef7a2b", 0.0)),
    (0.7, ("#ef7a2b", 0.6)),
    (1.0, ("#c43c00", 1.0)),
)
NOTHING = ("#808080", 0.13)  # a cell without a value
LETTER = 0.075  # inches of a letter, on average
RC = {
    "font.size": 8.5,
    "text.parse_math": False,  # names are not formulas
    "text.color": HUES["ink"][0],
    "axes.labelcolor": HUES["soft"][0],
    "axes.labelsize": 8.5,
    "axes.titlecolor": HUES["soft"][0],
    "axes.titlelocation": "left",
    "axes.titlesize": 8.5,
    "axes.edgecolor": HUES["grid"][0],
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": HUES["grid"][0],
    "grid.linewidth": 0.7,
    "xtick.labelcolor": HUES["soft"][0],
    "xtick.major.size": 0,
    "ytick.labelcolor": HUES["soft"][0],
    "ytick.major.size": 0,
    "svg.fonttype": "none",
}


@contextmanager
def looking_alike(salt: str = "") -> Iterator[None]:
    """Draw and write figures in these hues and letters.

    Args:
        salt: told into the names inside an SVG, which are hashes: else figures share some.
    """
    import matplotlib

    with matplotlib.rc_context({**RC, "svg.hashsalt": salt}):  # type: ignore[dict-item]
        yield


def letters(text: str) -> float:
    """About how many inches a text is wide."""
    return LETTER * len(text)


def framed(
    width: float, height: float, left: float, right: float, top: float = 0.3, bottom: float = 0.45
) -> "tuple[Figure, Axes]":
    """A figure with one panel, all in inches; made without pyplot, so none stays open."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    inside = (width - left - right, height - top - bottom)
    box = (left / width, bottom / height, inside[0] / width, inside[1] / height)
    return figure, figure.add_axes(box)


def shades(signed: bool) -> "Colormap":
    """Colours of a heat map."""
    from matplotlib import colormaps
    from matplotlib.colors import LinearSegmentedColormap, to_rgba

    if signed:
        steps = [(place, to_rgba(*colour)) for place, colour in SIGNED]
        weights = LinearSegmentedColormap.from_list("weights", steps)
        return weights.with_extremes(bad=to_rgba(*NOTHING))
    return colormaps["viridis"].with_extremes(bad=to_rgba(*NOTHING))
