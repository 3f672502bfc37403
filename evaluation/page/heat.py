"""Heat maps and timelines of the HTML reports.

A heat map is a PNG of one pixel per cell, enlarged without smoothing, in colours for light and for
dark pages; its values lie beside it for the page's script.
Shapes: R rows, C columns.
"""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import torch
from jaxtyping import Float
from torch import Tensor

from foreseer.evaluation.page.template import data_uri, island

DARK_MIDDLE = "#191d22"  # the card of the dark page: a weight of 0 leaves no mark
DARK_ENDS = ("#4aa8f0", "#ff8a3d")
EMPTY = {False: (242, 242, 242), True: (42, 48, 56)}  # a cell without a value, light and dark
Weights = tuple[Tensor, Sequence[int]]  # (S, S) rows of one branch, and the anchors
MAX_TICKS = 10
BAR_CELLS = 64


@dataclass(frozen=True)
class HeatAxes:
    """What the rows and columns of a heat map are.

    Args:
        rows: number of the step of each row, or another name.
        columns: the same of each column.
        row_name: what a row is, as in `forecast of step`.
        column_name: what a column is.
        value_name: what a cell is.
        form: format of the values.
    """

    rows: Sequence[int | str]
    columns: Sequence[int | str]
    row_name: str
    column_name: str
    value_name: str
    form: str = ".3f"


def heat_map(
    caption: str, values: Float[Tensor, "R C"], axes: HeatAxes, signed: bool, square: bool = False
) -> str:
    """A matrix as colours, with its values under the pointer.

    Args:
        caption: what it shows.
        values: the matrix; NaN where there is no value.
        axes: what its rows and columns are.
        signed: whether 0 is the middle of the colours; else they run from the least to the largest.
        square: whether to draw it as a square.

    Raises:
        ValueError: the matrix has no finite value, or another shape than its axes.
    """
    if tuple(values.shape) != (len(axes.rows), len(axes.columns)):
        raise ValueError(
            f"the heat map {caption!r} has shape {tuple(values.shape)}, its axes name "
            f"{len(axes.rows)} rows and {len(axes.columns)} columns."
        )
    values = values.detach().double().cpu()
    finite = values[values.isfinite()]
    if not len(finite):
        raise ValueError(f"the heat map {caption!r} has no finite value; leave it out.")
    low, high = float(finite.min()), float(finite.max())
    if signed:
        high = max(abs(low), abs(high)) or 1.0
        low = -high
    label = (
        f"{caption.rstrip('.')}. Heat map of {axes.value_name}: {axes.row_name} downward, "
        f"{axes.column_name} to the right, from {float(finite.min()):.3g} to "
        f"{float(finite.max()):.3g}."
    )
    height = "" if square else f' style="height:{max(6.0, min(30.0, 0.62 * len(values))):.1f}rem"'
    ramp = torch.linspace(low, high, BAR_CELLS, dtype=torch.float64)[None]
    told = {
        "label": label,
        "rows": list(axes.rows),
        "columns": list(axes.columns),
        "row_name": axes.row_name,
        "column_name": axes.column_name,
        "values": [
            [format(cell, axes.form) if math.isfinite(cell) else None for cell in row]
            for row in values.tolist()
        ],
    }
    return (
        f'<figure class="heat"><figcaption>{escape(caption)}</figcaption>\n<div class="plot">'
        f'<div class="ylabel">{escape(axes.row_name)} ↓</div>'
        f'<div class="yaxis" aria-hidden="true">{_ticks(axes.rows, "top")}</div>'
        f'<div class="canvas{" square" if square else ""}"{height}>'
        f"{_picture(values, low, high, signed, label)}</div>"
        f'<div class="xaxis{" square" if square else ""}" style="aspect-ratio:auto" '
        f'aria-hidden="true">{_ticks(axes.columns, "left")}</div>'
        f'<div class="xlabel{" square" if square else ""}" style="aspect-ratio:auto">'
        f"{escape(axes.column_name)} →</div>"
        f'<div class="bar"><span>{low:.3g}</span>{_picture(ramp, low, high, signed, "")}'
        f"<span>{high:.3g}</span><span>{escape(axes.value_name)}</span></div></div>\n"
        f"{island(told)}</figure>"
    )


def _ticks(names: Sequence[int | str], side: str) -> str:
    """The names beside a heat map's cells, as many as there is room for."""
    every = -(-len(names) // MAX_TICKS)
    return "".join(
        f'<span style="{side}:{100 * (index + 0.5) / len(names):.2f}%">{escape(str(name))}</span>'
        for index, name in enumerate(names)
        if index % every == 0
    )


def _picture(values: Float[Tensor, "R C"], low: float, high: float, signed: bool, alt: str) -> str:
    """The cells as an image, and another for dark pages where the colours differ."""
    light = data_uri(_png(values, low, high, signed, dark=False))
    dark = data_uri(_png(values, low, high, signed, dark=True))
    return (
        '<picture><source media="screen and (prefers-color-scheme: dark)" '
        f'srcset="{dark}"><img alt="{escape(alt)}" src="{light}"></picture>'
    )


def _png(values: Tensor, low: float, high: float, signed: bool, dark: bool) -> bytes:
    """One pixel per cell."""
    import numpy
    from matplotlib import colormaps
    from matplotlib.colors import Colormap, LinearSegmentedColormap
    from PIL import Image

    shades: Colormap = colormaps["RdBu_r" if signed else "viridis"]
    if signed and dark:
        ends = [DARK_ENDS[0], DARK_MIDDLE, DARK_ENDS[1]]
        shades = LinearSegmentedColormap.from_list("dark", ends)
    places = ((values - low) / ((high - low) or 1.0)).nan_to_num(0.0).numpy()
    colours = (255 * numpy.asarray(shades(places))[..., :3]).round().astype(numpy.uint8)
    colours[~values.isfinite().numpy()] = EMPTY[dark]
    buffer = io.BytesIO()
    Image.fromarray(colours).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def timeline(
    caption: str, lists: Mapping[str, Sequence[int]], num_steps: int, strong: Sequence[str] = ()
) -> str:
    """Which steps run the network, one line per list of anchors.

    Args:
        caption: what it shows.
        lists: label to steps.
        num_steps: steps of the full run.
        strong: labels of the learned predictors' lists.

    Raises:
        ValueError: there is no list, or a step lies outside the run.
    """
    if not lists:
        raise ValueError(f"the timeline {caption!r} has no list of anchors.")
    lines = []
    for label, steps in lists.items():
        if not steps or min(steps) < 0 or max(steps) >= num_steps:
            raise ValueError(
                f"the anchors of {label!r} are {list(steps)}, expected steps from 0 to "
                f"{num_steps - 1}."
            )
        told = f"{len(steps)} evaluations, at the steps {' '.join(map(str, steps))}"
        marks = "".join(
            f'<rect x="{100 * (step + 0.12) / num_steps:.2f}%" y="12%" '
            f'width="{76 / num_steps:.2f}%" height="76%" rx="2"><title>step {step}</title></rect>'
            for step in steps
        )
        css = ' class="learned"' if label in strong else ""
        lines.append(
            f'<li{css}><span>{escape(label)}</span><svg role="img" '
            f'aria-label="{escape(told)}"><title>{escape(told)}</title>'
            f'<line x1="0" x2="100%" y1="50%" y2="50%"/>{marks}</svg></li>'
        )
    scale = "".join(
        f'<span style="left:{100 * (step + 0.5) / num_steps:.2f}%">{step}</span>'
        for step in range(0, num_steps, max(1, -(-num_steps // MAX_TICKS)))
    )
    return (
        f'<figure class="timeline"><figcaption>{escape(caption)}</figcaption>'
        f'<ul class="lists">\n{chr(10).join(lines)}\n'
        f'<li aria-hidden="true"><span></span><div class="scale">{scale}</div></li></ul></figure>'
    )


def weight_map(caption: str, rows: Float[Tensor, "S S"], anchors: Sequence[int]) -> str:
    """The weights of a linear forecaster: a line per forecast step, a column per anchor.

    Args:
        caption: whose weights they are.
        rows: weight of every step's feature in every step's forecast.
        anchors: steps at which the network runs.

    Raises:
        ValueError: every step is an anchor, so nothing is forecast.
    """
    values, steps = forecast_weights(rows, anchors)
    names = {
        "row_name": "forecast of step",
        "column_name": "on the feature of step",
        "value_name": "weight",
    }
    axes = HeatAxes(steps, list(anchors), **names)
    return heat_map(caption, values, axes, signed=True)


def forecast_weights(
    rows: Float[Tensor, "S S"], anchors: Sequence[int]
) -> tuple[Float[Tensor, "T K"], list[int]]:
    """The part of a weight matrix that forecasts: NaN where an anchor is yet to come; its steps.

    Raises:
        ValueError: every step is an anchor.
    """
    steps = [step for step in range(rows.shape[-1]) if step not in anchors]
    if not steps:
        raise ValueError(f"all {rows.shape[-1]} steps are anchors; there are no weights to draw.")
    values = rows.detach().double().cpu()[steps][:, list(anchors)].clone()
    for place, step in enumerate(steps):
        values[place, [anchor > step for anchor in anchors]] = torch.nan
    return values, steps


def weight_maps(weights: Mapping[str, Weights]) -> str:
    """Several weight maps side by side, by caption."""
    maps = [weight_map(label, rows, anchors) for label, (rows, anchors) in weights.items()]
    return '<div class="pair">\n' + "\n".join(maps) + "\n</div>"
