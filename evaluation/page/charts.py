"""Kinds of figures: curves, heat maps and anchor lists, drawn once for page, PNG and TensorBoard.

A figure says what it shows; matplotlib draws it. Shapes: R rows, C columns.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foreseer.evaluation.page.look import (
    COLD,
    DASHES,
    GREYS,
    HUES,
    WARM,
    framed,
    letters,
    looking_alike,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Panel
    from matplotlib.figure import Figure

Number = int | float
Table = tuple[Sequence[str], Sequence[Sequence[str]]]  # headings, lines
WIDE, NARROW = 10.0, 4.2  # inches: across the page, and side by side
TOP, BOTTOM, MARGIN = 0.3, 0.45, 0.1  # inches: titles, ticks and names, what stays free
LINE = 0.155  # inches of one name beside a chart
DPI = 144
MAX_TICKS = 12
STYLES: Mapping[str, tuple[Sequence[str], Mapping[str, Any]]] = {
    "learned": (WARM, {"linewidth": 2.4, "markersize": 5.5, "zorder": 4}),
    "solver": (COLD, {"linewidth": 1.4, "markersize": 4.0, "zorder": 3}),
    "formula": (GREYS, {"linewidth": 0.8, "markersize": 3.5, "zorder": 2}),
}


class Chart:
    """A figure of one panel.

    Attributes:
        caption: what it shows.
        wide: whether it is drawn across the page.
    """

    caption: str
    wide = True

    def figure(self) -> "Figure":
        """The drawing."""
        with looking_alike():
            return self._figure()

    def save(self, path: Path) -> Path:
        """Write it as PNG; figures are made without pyplot, so none stays open."""
        self.figure().savefig(path, dpi=DPI, metadata={"Software": None})
        return path

    def values(self) -> Table:
        """The numbers it is drawn from, as words."""
        raise NotImplementedError

    def words(self) -> str:
        """What a reader who does not see it is told."""
        raise NotImplementedError

    def _figure(self) -> "Figure":
        raise NotImplementedError


@dataclass(frozen=True)
class Curve:
    """A line of a chart.

    Args:
        label: its name.
        points: (x, y) pairs with rising x; a y that is not finite breaks the line.
        kind: `learned` is warm and thick, `solver` cold, `formula` grey and thin.
        note: what stands behind its name.
    """

    label: str
    points: Sequence[tuple[Number, Number]]
    kind: str = "solver"
    note: str = ""


@dataclass(frozen=True)
class Axes:
    """What a chart's axes mean.

    Args:
        x: name of the horizontal axis.
        y: name of the vertical axis, with its unit.
        form: format of the values.
        log: whether the vertical axis is logarithmic; values of 0 and below break a line then.
    """

    x: str
    y: str
    form: str = ".2f"
    log: bool = False


@dataclass(frozen=True)
class LineChart(Chart):
    """Curves with their names beside their ends.

    Args:
        caption: what it shows.
        curves: the lines, the most important first: it lies on top.
        axes: names and scale.
        band: (x, low, high): a region drawn behind, in the hue of the learned.
        edges: x at which something changes, drawn as dashed lines.
        wide: whether it is drawn across the page.

    Raises:
        ValueError: there is no curve with a point.
    """

    caption: str
    curves: Sequence[Curve]
    axes: Axes
    band: Sequence[tuple[Number, Number, Number]] = ()
    wide: bool = True
    edges: Sequence[Number] = ()

    def __post_init__(self) -> None:
        """Refuse a chart of nothing."""
        if not self._xs():
            raise ValueError(f"the chart {self.caption!r} has no point to draw; leave it out.")

    def values(self) -> Table:
        """A line per x and a column per curve, or the other way round where x are fewer."""
        xs, found = self._xs(), [dict(curve.points) for curve in self.curves]
        labels, cells = [curve.label for curve in self.curves], [f"{x:g}" for x in xs]
        if len(xs) < len(labels):
            lines = [[self._said(y.get(x)) for x in xs] for y in found]
            return [self.axes.x, *cells], [
                [name, *of] for name, of in zip(labels, lines, strict=True)
            ]
        lines = [[self._said(y.get(x)) for y in found] for x in xs]
        return [self.axes.x, *labels], [[x, *of] for x, of in zip(cells, lines, strict=True)]

    def words(self) -> str:
        """Axes and number of curves."""
        return f"{self.axes.y} against {self.axes.x}, {len(self.curves)} curves"

    def _xs(self) -> list[Number]:
        return sorted({x for curve in self.curves for x, _ in curve.points})

    def _drawable(self, y: Number) -> bool:
        return math.isfinite(y) and (y > 0 or not self.axes.log)

    def _said(self, value: Number | None) -> str:
        if value is None or math.isnan(value):
            return "–"
        return "exact" if math.isinf(value) else format(value, self.axes.form)

    def _ends(self) -> list[tuple[Number, Number] | None]:
        """The last point of every curve that can be drawn; the names stand beside them."""
        return [
            next((point for point in reversed(curve.points) if self._drawable(point[1])), None)
            for curve in self.curves
        ]

    def _figure(self) -> "Figure":
        width = WIDE if self.wide else NARROW
        height = max(3.0, 0.4 * width, TOP + BOTTOM + LINE * len(self.curves))
        names = max(letters(curve.label) for curve in self.curves)
        notes = max(letters(curve.note) for curve in self.curves)
        right = 0.35 + names + (notes + 0.15 if notes else 0.0)
        figure, panel = framed(width, height, 0.45, right)
        if self.band:
            xs, low, high = zip(*self.band, strict=True)
            panel.fill_between(xs, low, high, color=WARM[0], alpha=0.12, linewidth=0)
        for x in self.edges:
            panel.axvline(x, color=HUES["soft"][0], linestyle=DASHES[1], linewidth=0.7)
        colours = self._lines(panel)
        self._scales(panel)
        self._names(panel, colours, names + notes + 0.15)
        return figure

    def _lines(self, panel: "Panel") -> list[str]:
        """Draw the curves, hues and dashes by their kind and order; their colours."""
        marker = "o" if len(self._xs()) < 2 * MAX_TICKS else ""
        seen: dict[str, int] = {}
        colours = []
        for index, curve in enumerate(self.curves):
            hues, style = STYLES[curve.kind]
            turn, place = divmod(seen.setdefault(curve.kind, 0), len(hues))
            seen[curve.kind] += 1
            colours.append(hues[place])
            style = dict(style, zorder=style["zorder"] - index / 1000)
            panel.plot(
                [x for x, _ in curve.points],
                [y if self._drawable(y) else math.nan for _, y in curve.points],
                color=hues[place],
                linestyle=DASHES[turn % len(DASHES)],
                marker=marker,
                markeredgecolor=HUES["card"][0],
                markeredgewidth=0.7,
                gid=f"mark{index}",
                **style,
            )
        return colours

    def _scales(self, panel: "Panel") -> None:
        from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

        xs = self._xs()
        panel.set_title(self.axes.y)
        panel.set_xlabel(self.axes.x)
        panel.margins(x=0.02)
        if len(xs) <= MAX_TICKS:
            panel.set_xticks(xs, [f"{x:g}" for x in xs])
        else:
            panel.xaxis.set_major_locator(MaxNLocator(MAX_TICKS, integer=True))
        panel.grid(axis="x", visible=False)
        if self.axes.log:
            panel.set_yscale("log")
            low, high = panel.get_ylim()
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
            panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            panel.minorticks_off()

    def _names(self, panel: "Panel", colours: Sequence[str], column: float) -> None:
        """Write the names from top to bottom as the curves end, none upon another.

        Args:
            panel: with all curves drawn.
            colours: of the curves.
            column: inches from the names' left end to the notes' right end.
        """
        from sklearn.isotonic import isotonic_regression

        box = panel.get_position()
        figure = panel.figure
        width, height = figure.bbox.width / figure.dpi, figure.bbox.height / figure.dpi
        place = (panel.transData + panel.transAxes.inverted()).transform
        ends = self._ends()
        heights = [float(place(end)[1]) if end else 0.0 for end in ends]
        order = sorted(range(len(heights)), key=lambda index: -heights[index])
        # Names at least `gap` apart and as near to the ends as can be: an isotonic regression.
        gap = LINE / (height * box.height)
        below = gap * (len(order) - 1)
        wanted = [heights[index] + gap * rank for rank, index in enumerate(order)]
        found = isotonic_regression(wanted, y_min=below, y_max=max(1.0, below), increasing=False)
        inch = 1 / (width * box.width)
        left = 1 + 0.3 * inch
        for rank, index in enumerate(order):
            curve, place_y = self.curves[index], float(found[rank]) - gap * rank
            style: dict[str, Any] = {
                "annotation_clip": False,
                "va": "center",
                "gid": f"mark{index}",
            }
            style["fontweight"] = "bold" if curve.kind == "learned" else "normal"
            line = {
                "color": colours[index],
                "linewidth": 0.5,
                "shrinkA": 1,
                "shrinkB": 2,
                "gid": style["gid"],
            }
            panel.annotate(
                curve.label,
                ends[index] or (left, place_y),
                (left, place_y),
                "data" if ends[index] else "axes fraction",
                "axes fraction",
                {**line, "arrowstyle": "-", "alpha": 0.6, "relpos": (0, 0.5)},
                color=colours[index],
                **style,
            )
            end = (left + column * inch, place_y)
            panel.annotate(curve.note, end, xycoords="axes fraction", ha="right", **style)
