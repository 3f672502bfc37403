"""The figures of a benchmark: quality against cost, samples side by side, which steps run.

Shapes: B samples, C channels (1 or 3), H height, W width.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from foreseer.evaluation.metrics import psnr
from foreseer.evaluation.page.table import best_rows, decibels
from foreseer.evaluation.results import BenchRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colour-blind safe hues: warm ones for learned methods, cold ones for solvers.
WARM = ("#D55E00", "#CC79A7", "#E69F00", "#8A3B12", "#7B2D6B")
COLD = ("#0072B2", "#009E73", "#56B4E9", "#1B3A5C")
GREYS = ("#3C3C3C", "#808080", "#5A5A5A", "#949494")
MARKERS = "osD^vPX<>*"
STYLES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "learned": (WARM, {"linewidth": 2.8, "linestyle": "-", "markersize": 6, "zorder": 4}),
    "solver": (COLD, {"linewidth": 1.4, "linestyle": "-", "markersize": 4.5, "zorder": 3}),
    "formula": (GREYS, {"linewidth": 0.9, "linestyle": "--", "markersize": 3.5, "zorder": 2}),
}
DPI = 144
CELL = 96  # pixels: smallest side of one sample on the contact sheet
LARGEST_CELL = 192  # pixels: larger samples are averaged down to this
GAP = 6  # pixels between samples
DIFFERENCE_GAIN = 4


def save_figure(figure: "Figure", path: Path) -> Path:
    """Write a figure as PNG; figures are made without pyplot, so none stays open."""
    figure.savefig(path, dpi=DPI, facecolor="white", metadata={"Software": None})
    return path


def tidy(axes: "Axes", title: str, x: str, y: str) -> None:
    """Give axes a title, labels, a faint grid and no box."""
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def plot_pareto(rows: Sequence[BenchRow], path: Path) -> Path:
    """PSNR against network evaluations, one line per method on its best tap and anchor list.

    The band spans the 10 % to 90 % quantiles over samples of the best learned row per budget.
    Rows with infinite PSNR are not drawn.

    Args:
        rows: rows of one benchmark; one panel per guidance scale.
        path: PNG to write.
    """
    from matplotlib.figure import Figure

    shown = [row for row in best_rows(rows, "method") if math.isfinite(row.psnr_db)]
    looks = _looks(shown)
    scales = sorted({row.guidance_scale for row in shown})
    figure = Figure(figsize=(8.6, 5.6 * max(1, len(scales))), layout="constrained")
    for panel, scale in enumerate(scales):
        axes = figure.add_subplot(len(scales), 1, panel + 1)
        here = [row for row in shown if row.guidance_scale == scale]
        band = best_rows(row for row in here if row.kind == "learned")
        axes.fill_between(
            [row.num_anchors for row in band],
            [row.psnr_q10 for row in band],
            [row.psnr_q90 for row in band],
            color=WARM[0],
            alpha=0.13,
            linewidth=0,
        )
        for method, look in looks.items():
            line = sorted((r for r in here if r.method == method), key=lambda r: r.num_anchors)
            axes.plot([r.num_anchors for r in line], [r.psnr_db for r in line], **look)
        axes.set_xticks(sorted({row.num_anchors for row in here}))
        title = f"Guidance {scale:g}. Thick: learned (band: 10 to 90 % of samples of the best), "
        title += "thin: solvers, dashed: formulas"
        tidy(axes, title, "network evaluations", "PSNR against the full run (dB)")
        _direct_labels(axes, {row.method: row for row in reversed(here)}, looks)
    return save_figure(figure, path)


def _looks(rows: Sequence[BenchRow]) -> dict[str, dict[str, Any]]:
    """Line style of each method: hue and stroke by kind, shade and marker by mean PSNR."""
    looks = {}
    for kind, (colours, style) in STYLES.items():
        scores: dict[str, list[float]] = {}
        for row in rows:
            if row.kind == kind:
                scores.setdefault(row.method, []).append(row.psnr_db)
        ranked = sorted(scores, key=lambda method: -sum(scores[method]) / len(scores[method]))
        for rank, method in enumerate(ranked):
            colour, marker = colours[rank % len(colours)], MARKERS[rank % len(MARKERS)]
            looks[method] = {"color": colour, "marker": marker, **style}
    return looks


def _direct_labels(
    axes: "Axes", rows: Mapping[str, BenchRow], looks: Mapping[str, dict[str, Any]]
) -> None:
    """Name each line beside its right end, pushed apart so that no two names overlap.

    Args:
        axes: axes with all lines drawn.
        rows: last row of each line by method.
        looks: line style of each method.
    """
    low, high = axes.get_ylim()
    left, right = axes.get_xlim()
    spacing = (high - low) / 26  # height of one line of text
    ordered = sorted(rows.values(), key=lambda row: -row.psnr_db)
    heights: list[float] = []
    for row in ordered:
        heights.append(min(row.psnr_db, heights[-1] - spacing) if heights else row.psnr_db)
    drift = sum(row.psnr_db - height for row, height in zip(ordered, heights, strict=True))
    lift = min(drift / max(1, len(ordered)), high - spacing - heights[0])
    for row, height in zip(ordered, heights, strict=True):
        colour = looks[row.method]["color"]
        axes.annotate(
            row.method,
            (row.num_anchors, row.psnr_db),
            (right + 0.06 * (right - left), height + lift),
            color=colour,
            fontsize=8.5,
            fontweight="bold" if row.kind == "learned" else "normal",
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.6,
                "alpha": 0.7,
                "relpos": (0, 0.5),
                "shrinkA": 1,
            },
        )


def contact_sheet(images: Mapping[str, Float[Tensor, "B C H W"]], path: Path) -> Path:
    """The same samples from each method, one row each, with the differences underneath.

    The first row is the full run. Under every other row lies a strip of
    |difference| x 4; the number beside it is the mean PSNR of the samples shown. Small samples
    are enlarged by a whole factor, without interpolation; large ones are averaged down.

    Args:
        images: label to samples in [0, 1]; the first entry is the full run.
        path: PNG to write.

    Raises:
        ValueError: there is no entry, or the shapes differ.
    """
    from matplotlib.figure import Figure

    if not images:
        raise ValueError("A contact sheet needs at least the samples of the full run.")
    reference = next(iter(images.values())).detach().double().cpu()
    strips, labels = [_strip(reference)], [next(iter(images))]
    for label, samples in list(images.items())[1:]:
        samples = samples.detach().double().cpu()
        mean = float(psnr(samples, reference).mean())
        strips += [_strip(samples), _strip((samples - reference).abs() * DIFFERENCE_GAIN)]
        labels += [f"{label}\n{decibels(mean)} dB", f"|difference| × {DIFFERENCE_GAIN}"]
    sheet = torch.cat(strips)  # (height, width, 3)
    margin, height = 190, strips[0].shape[0]
    size = ((margin + sheet.shape[1]) / DPI, sheet.shape[0] / DPI)
    figure = Figure(figsize=size, dpi=DPI)
    figure.figimage(sheet.numpy(), xo=margin, yo=0, origin="upper")
    for index, label in enumerate(labels):
        faint = label.startswith("|")
        figure.text(
            (margin - 12) / DPI / size[0],
            1 - (index + 0.5) * height / sheet.shape[0],
            label,
            ha="right",
            va="center",
            fontsize=7 if faint else 8.5,
            color="#666666" if faint else "black",
        )
    return save_figure(figure, path)


def _strip(images: Tensor) -> Tensor:
    """Samples side by side on white, (H', W', 3) in [0, 1]."""
    if min(images.shape[-2:]) > LARGEST_CELL:
        shrink = LARGEST_CELL / min(images.shape[-2:])
        images = torch.nn.functional.interpolate(images, scale_factor=shrink, mode="area")
    factor = max(1, math.ceil(CELL / min(images.shape[-2:])))
    big = images.clamp(0, 1).repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    big = torch.nn.functional.pad(big.expand(-1, 3, -1, -1), (0, GAP, 0, GAP), value=1.0)
    return torch.cat(list(big.permute(0, 2, 3, 1)), dim=1)


def plot_timeline(lists: Mapping[str, Sequence[int]], num_steps: int, path: Path) -> Path:
    """Draw `timeline_figure` into a PNG.

    Args:
        lists: label to anchor indices.
        num_steps: steps of the full run.
        path: PNG to write.
    """
    return save_figure(timeline_figure(lists, num_steps), path)


def timeline_figure(lists: Mapping[str, Sequence[int]], num_steps: int) -> "Figure":
    """Which steps run the network, one line per anchor list.

    Args:
        lists: label to anchor indices.
        num_steps: steps of the full run.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 1.1 + 0.24 * len(lists)), layout="constrained")
    axes = figure.add_subplot()
    for row, steps in enumerate(lists.values()):
        axes.plot([0, num_steps - 1], [row, row], color="#DDDDDD", linewidth=1, zorder=1)
        axes.plot(steps, [row] * len(steps), "s", color=COLD[0], markersize=5, zorder=2)
    axes.set_yticks(range(len(lists)), list(lists), fontsize=8)
    axes.set_ylim(len(lists) - 0.4, -0.6)
    tidy(axes, "Steps at which the network runs", "step (0 is pure noise)", "")
    return figure
