"""Curves and timelines of the HTML reports, as SVG that keeps its line widths at any size.

Places are fractions of the drawing area, so a figure fills a phone and a desktop alike, and the
numbers it is drawn from lie beside it: for the page's script, and as a table.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from foreseer.evaluation.page.template import island

LOOKS = {"learned": "wwwww", "solver": "kkkk", "formula": "gggg"}  # hues: warm, cold, grey
DASHES = 5  # a solid line and four kinds of dashes; formulas are never solid
Number = int | float
Band = Sequence[tuple[Number, Number, Number]]  # x, low, high


@dataclass(frozen=True)
class Curve:
    """A line of a chart.

    Args:
        label: its name.
        points: (x, y) pairs with rising x; a y that is not finite breaks the line.
        look: classes of its hue and dashes, see `looks`.
        strong: whether it is drawn thick.
        note: what the legend says beside the name.
    """

    label: str
    points: Sequence[tuple[Number, Number]]
    look: str = "k0"
    strong: bool = False
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


def looks(labels: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Hue and dashes of every curve, different within a kind as long as there are enough.

    Args:
        labels: kind (`learned`, `solver` or `formula`) to labels, best first.
    """
    found = {}
    for kind, hues in LOOKS.items():
        for index, label in enumerate(labels.get(kind, ())):
            round_, place = divmod(index, len(hues))
            dash = 1 + round_ % (DASHES - 1) if kind == "formula" else round_ % DASHES
            found[label] = f"{hues[place]}{place}" + (f" d{dash}" if dash else "")
    return found


def line_chart(
    caption: str, curves: Sequence[Curve], axes: Axes, band: Band = (), wide: bool = True
) -> str:
    """Curves with a legend, their values under the pointer, and a table of them.

    Args:
        caption: what it shows.
        curves: the lines, in the order of the legend.
        axes: names and scale.
        band: a region drawn behind, in the hue of the learned.
        wide: whether the legend lies beside the curves where there is room.

    Raises:
        ValueError: no curve has a point that can be drawn.
    """
    xs = sorted({x for curve in curves for x, _ in curve.points})
    shown = [y for curve in curves for _, y in curve.points if drawable(y, axes.log)]
    if not shown:
        raise ValueError(f"the chart {caption!r} has no point to draw; leave it out.")
    edges = [y for _, low, high in band for y in (low, high)]
    scale = Scale.around([*shown, *edges], axes.log)
    width = (xs[-1] - xs[0]) or 1.0
    margin = 0.04 if len(xs) < 12 else 0.01
    places = {x: margin + (1 - 2 * margin) * (x - xs[0]) / width for x in xs}
    places = {x: 0.5 for x in xs} if len(xs) == 1 else places
    label = f"{caption.rstrip('.')}. {axes.y} against {axes.x}, {len(curves)} curves."
    return (
        f'<figure class="chart lines{" wide" if wide else ""}">'
        f'<figcaption>{escape(caption)}</figcaption>\n<div class="row">'
        f'<div class="plot"><div class="ylabel">{escape(axes.y)}</div>'
        f'<div class="yaxis" aria-hidden="true">{"".join(_y_ticks(scale))}</div>'
        f'<div class="canvas">{_drawing(curves, places, scale, label, band)}</div>'
        f'<div class="xaxis" aria-hidden="true">{"".join(_x_ticks(xs, places))}</div>'
        f'<div class="xlabel">{escape(axes.x)}</div></div>\n{_legend(curves)}</div>\n'
        f"{_values(xs, curves, axes)}\n{island(_told(xs, curves, axes, places, scale, label))}"
        "</figure>"
    )


@dataclass(frozen=True)
class Scale:
    """A vertical axis.

    Args:
        low: value at the bottom.
        high: value at the top.
        log: whether it is logarithmic.
    """

    low: Number
    high: Number
    log: bool

    @classmethod
    def around(cls, values: Sequence[Number], log: bool) -> "Scale":
        """One that holds all values, with some room."""
        low, high = min(values), max(values)
        if log:
            return cls(low / 1.3, high * 1.3, True)
        room = 0.06 * (high - low) or 0.5
        return cls(low - room, high + room, False)

    def height(self, value: Number) -> float:
        """Where a value is, from 0 at the top to 1 at the bottom."""
        low, high, at = (
            math.log10(each) if self.log else float(each) for each in (self.low, self.high, value)
        )
        return (high - at) / (high - low)

    def ticks(self) -> list[Number]:
        """Round values to mark."""
        if not self.log:
            return list(_round_steps(self.low, self.high))
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        decades = range(first, last + 1)
        for digits in ((1,), (1, 3), (1, 2, 5)):
            found = [d * 10.0**power for power in decades for d in digits]
            found = [value for value in found if self.low <= value <= self.high]
            if len(found) >= 3:
                return found
        return found or [self.low, self.high]


def drawable(value: Number, log: bool) -> bool:
    """Whether a value has a place on the axis."""
    return math.isfinite(value) and (value > 0 or not log)


def _round_steps(low: Number, high: Number) -> Iterator[Number]:
    """Multiples of 1, 2 or 5 times a power of ten: four to nine of them."""
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(k * power for k in (1, 2, 5, 10) if (high - low) / (k * power) <= 8)
    for k in range(math.ceil(low / step), math.floor(high / step) + 1):
        yield k * step


def _y_ticks(scale: Scale) -> Iterator[str]:
    for value in scale.ticks():
        yield f'<span style="top:{100 * scale.height(value):.2f}%">{value:.4g}</span>'


def _x_ticks(xs: Sequence[Number], places: Mapping[Number, float]) -> Iterator[str]:
    if len(xs) < 12:
        marked = list(xs)
    else:
        width = xs[-1] - xs[0]
        step = next(k for k in itertools.chain((1, 2), itertools.count(5, 5)) if width / k <= 10)
        marked = [x for x in xs if x % step == 0]
    for x in marked:
        yield f'<span style="left:{100 * places[x]:.2f}%">{x:g}</span>'


def _drawing(
    curves: Sequence[Curve],
    places: Mapping[Number, float],
    scale: Scale,
    label: str,
    band: Band,
) -> str:
    """Two layers: stretched lines, and markers that stay round."""
    lines, dots = [], []
    for tick in scale.ticks():
        y = 1000 * scale.height(tick)
        lines.append(f'<line class="rule" x1="0" x2="1000" y1="{y:.1f}" y2="{y:.1f}"/>')
    if band:
        upper = [(places[x], scale.height(high)) for x, _, high in band]
        lower = [(places[x], scale.height(low)) for x, low, _ in reversed(band)]
        corners = " ".join(f"{1000 * x:.1f},{1000 * y:.1f}" for x, y in [*upper, *lower])
        lines.append(f'<polygon class="band w0" points="{corners}"/>')
    for index in reversed(range(len(curves))):  # the first lies on top
        curve = curves[index]
        css = f'class="mark {curve.look}{" strong" if curve.strong else ""}" data-curve="{index}"'
        for run in _runs(curve, scale.log):
            path = " ".join(f"{1000 * places[x]:.1f},{1000 * scale.height(y):.1f}" for x, y in run)
            lines.append(f'<polyline {css} points="{path}"/>')
            radius = 4.5 if curve.strong else 3.2
            if len(places) < 24 or len(run) == 1:
                dots += [
                    f'<circle {css} cx="{100 * places[x]:.2f}%" '
                    f'cy="{100 * scale.height(y):.2f}%" r="{radius}"/>'
                    for x, y in run
                ]
    return (
        f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(label)}"><title>{escape(label)}</title>{"".join(lines)}</svg>'
        f'<svg aria-hidden="true">{"".join(dots)}</svg>'
    )


def _runs(curve: Curve, log: bool) -> Iterator[list[tuple[Number, Number]]]:
    """The unbroken pieces of a line."""
    run: list[tuple[Number, Number]] = []
    for x, y in curve.points:
        if drawable(y, log):
            run.append((x, y))
        elif run:
            yield run
            run = []
    if run:
        yield run


def _legend(curves: Sequence[Curve]) -> str:
    items = "\n".join(
        f'<li><button type="button" data-curve="{index}" aria-pressed="false" '
        f'class="{curve.look}{" strong" if curve.strong else ""}"><svg aria-hidden="true">'
        f'<line x1="0" x2="100%" y1="50%" y2="50%"/></svg>{escape(curve.label)}'
        f"{f'<b>{escape(curve.note)}</b>' if curve.note else ''}</button></li>"
        for index, curve in enumerate(curves)
    )
    return f'<ul class="legend" aria-label="Curves; press one to see it alone">\n{items}\n</ul>'


def _values(xs: Sequence[Number], curves: Sequence[Curve], axes: Axes) -> str:
    """The numbers of a chart as a table."""
    heads = "".join(f'<th scope="col">{escape(curve.label)}</th>' for curve in curves)
    found = [dict(curve.points) for curve in curves]
    lines = "\n".join(
        f'<tr><th scope="row">{x:g}</th>'
        + "".join(f"<td>{_shown(points.get(x), axes)}</td>" for points in found)
        + "</tr>"
        for x in xs
    )
    return (
        f'<details class="values"><summary>Values</summary><div class="scroll" tabindex="0" '
        f'role="group" aria-label="Values of the chart"><table>\n<thead><tr><th scope="col">'
        f"{escape(axes.x)}</th>{heads}</tr></thead>\n<tbody>\n{lines}\n</tbody></table></div>"
        "</details>"
    )


def _told(
    xs: Sequence[Number],
    curves: Sequence[Curve],
    axes: Axes,
    places: Mapping[Number, float],
    scale: Scale,
    label: str,
) -> dict[str, object]:
    """What the page's script reads."""
    told = []
    for curve in curves:
        points = {x: y for x, y in curve.points if drawable(y, axes.log)}
        ys = [points.get(x) for x in xs]
        told.append(
            {
                "label": curve.label,
                "css": curve.look,
                "y": ys,
                "shown": [_shown(y, axes) for y in ys],
                "heights": [None if y is None else round(scale.height(y), 4) for y in ys],
            }
        )
    return {
        "label": label,
        "x_name": axes.x,
        "x": list(xs),
        "places": [round(places[x], 4) for x in xs],
        "curves": told,
    }


def _shown(value: Number | None, axes: Axes) -> str:
    """A value in words."""
    if value is None or math.isnan(value):
        return "–"
    return "exact" if math.isinf(value) else format(value, axes.form)
