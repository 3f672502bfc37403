"""Heat maps, and lists of anchors as marks on a line. Shapes: R rows, C columns, S steps."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from foreseer.evaluation.page.charts import MAX_TICKS, NARROW, WIDE, Chart, Table
from foreseer.evaluation.page.look import COLD, HUES, WARM, framed, letters, shades

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure


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


@dataclass(frozen=True)
class HeatMap(Chart):
    """A matrix as colours.

    Args:
        caption: what it shows.
        matrix: NaN where there is no value.
        axes: what its rows and columns are.
        signed: whether 0 is the middle of the colours; else they run from the least to the largest.

    Raises:
        ValueError: the matrix has no finite value, or another shape than its axes.
    """

    caption: str
    matrix: Float[Tensor, "R C"]
    axes: HeatAxes
    signed: bool = False
    wide = False

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn."""
        rows, columns = len(self.axes.rows), len(self.axes.columns)
        if tuple(self.matrix.shape) != (rows, columns):
            raise ValueError(
                f"the heat map {self.caption!r} has shape {tuple(self.matrix.shape)}, its axes "
                f"name {rows} rows and {columns} columns."
            )
        if not self.matrix.isfinite().any():
            raise ValueError(f"the heat map {self.caption!r} has no finite value; leave it out.")

    def values(self) -> Table:
        """The matrix."""
        heads = [f"{self.axes.row_name} ↓ {self.axes.column_name} →", *map(str, self.axes.columns)]
        cells = [
            [format(cell, self.axes.form) if math.isfinite(cell) else "–" for cell in row]
            for row in self.matrix.tolist()
        ]
        return heads, [[str(n), *row] for n, row in zip(self.axes.rows, cells, strict=True)]

    def words(self) -> str:
        """Axes and range."""
        low, high = self._range()
        return (
            f"Heat map of {self.axes.value_name}: {self.axes.row_name} downward, "
            f"{self.axes.column_name} to the right, from {low:.3g} to {high:.3g}"
        )

    def _range(self) -> tuple[float, float]:
        finite = self.matrix[self.matrix.isfinite()]
        return float(finite.min()), float(finite.max())

    def _figure(self) -> "Figure":
        low, high = self._range()
        if self.signed:
            high = max(abs(low), abs(high)) or 1.0
            low = -high
        left = 0.2 + max(letters(str(name)) for name in self.axes.rows)
        figure, panel = framed(
            NARROW,
            min(4.2, max(2.2, 1.2 + 0.09 * len(self.axes.rows))),
            left,
            right=0.3 + max(0.5, letters(self.axes.value_name)),
        )
        panel.grid(visible=False)
        style: dict[str, Any] = {"cmap": shades(self.signed), "vmin": low, "vmax": high}
        cells = self.matrix.detach().double().cpu().numpy()
        image = panel.imshow(cells, aspect="auto", interpolation="none", **style)
        _tick(panel.yaxis, self.axes.rows)
        _tick(panel.xaxis, self.axes.columns)
        panel.set_title(f"{self.axes.row_name} ↓")
        panel.set_xlabel(f"{self.axes.column_name} →")
        bar = figure.colorbar(image, ax=panel, fraction=0.045, pad=0.03, aspect=30)
        assert bar.solids is not None
        bar.solids.set_rasterized(True)  # else hundreds of paths
        bar.outline.set_visible(False)
        bar.ax.set_title(self.axes.value_name, loc="left")
        return figure


def _tick(axis: "Axis", names: Sequence[int | str]) -> None:
    """Name as many cells as there is room for."""
    every = -(-len(names) // MAX_TICKS)
    axis.set_ticks(range(0, len(names), every), [str(name) for name in names[::every]])


@dataclass(frozen=True)
class Timeline(Chart):
    """Which steps run the network, one line per list of anchors.

    Args:
        caption: what it shows.
        lists: label to steps.
        num_steps: steps of the full run.
        strong: labels of the learned predictors' lists.

    Raises:
        ValueError: there is no list, or a step lies outside the run.
    """

    caption: str
    lists: Mapping[str, Sequence[int]]
    num_steps: int
    strong: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn."""
        if not self.lists:
            raise ValueError(f"the timeline {self.caption!r} has no list of anchors.")
        for label, steps in self.lists.items():
            if not steps or min(steps) < 0 or max(steps) >= self.num_steps:
                raise ValueError(
                    f"the anchors of {label!r} are {list(steps)}, expected steps from 0 to "
                    f"{self.num_steps - 1}."
                )

    def values(self) -> Table:
        """The steps of every list."""
        lines = [
            (label, str(len(steps)), " ".join(map(str, steps)))
            for label, steps in self.lists.items()
        ]
        return ("list", "evaluations", "steps"), lines

    def words(self) -> str:
        """Number of lists and steps."""
        return f"{len(self.lists)} lists of anchors among {self.num_steps} steps"

    def _figure(self) -> "Figure":
        left = 0.2 + max(map(letters, self.lists))
        height = 0.55 + 0.19 * len(self.lists)
        figure, panel = framed(WIDE, height, left, right=0.1, top=0.05)
        panel.grid(visible=False)
        panel.spines[:].set_visible(False)
        for row, (label, steps) in enumerate(self.lists.items()):
            hue = (WARM if label in self.strong else COLD)[0]
            panel.plot([0, self.num_steps - 1], [row, row], color=HUES["grid"][0], linewidth=1)
            panel.plot(steps, [row] * len(steps), "s", color=hue, markersize=5.5, gid=f"mark{row}")
        panel.set_yticks(range(len(self.lists)), list(self.lists))
        for label, name in zip(self.lists, panel.get_yticklabels(), strict=True):
            if label in self.strong:
                name.set(fontweight="bold", color=HUES["ink"][0])
        panel.set_ylim(len(self.lists) - 0.4, -0.6)
        panel.margins(x=0.015)
        panel.set_xlabel("step (0 is pure noise)")
        return figure
