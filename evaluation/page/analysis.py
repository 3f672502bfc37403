"""Figures that look inside a forecaster: error per step, weights, how the layers move.

Shapes: S steps, L layers, T forecast steps, K columns of weights (anchors or earlier steps).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from foreseer.evaluation.page.plots import COLD, GREYS, MARKERS, WARM, save_figure, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_step_errors(curves: Mapping[str, Sequence[tuple[int, float]]], path: Path) -> Path:
    """Draw `step_error_figure` into a PNG.

    Args:
        curves: label to (step, error) pairs.
        path: PNG to write.
    """
    return save_figure(step_error_figure(curves), path)


def step_error_figure(curves: Mapping[str, Sequence[tuple[int, float]]]) -> "Figure":
    """Relative error at each step, on a logarithmic axis.

    Args:
        curves: label to (step, error) pairs; an error of 0 (an anchor) breaks the line.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 4.4), layout="constrained")
    axes = figure.add_subplot()
    colours = (WARM[0], COLD[0], COLD[1], WARM[1], WARM[2], COLD[2], GREYS[0], WARM[4], GREYS[1])
    for index, (label, points) in enumerate(curves.items()):
        axes.plot(
            [step for step, _ in points],
            [error if error > 0 else float("nan") for _, error in points],
            label=label,
            color=colours[index % len(colours)],
            marker=MARKERS[index % len(MARKERS)],
            markersize=3.5,
            linewidth=1.3,
        )
    axes.set_yscale("log")
    tidy(axes, "Error per step", "step (0 is pure noise)", "relative error")
    if curves:
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def plot_rule_errors(
    panels: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]],
    strong: Sequence[str],
    path: Path,
) -> Path:
    """Error per step of many rules, one panel per tap, the legend beside the last.

    Args:
        panels: title to curves: label to (step, error) pairs; an error of 0 breaks the line.
        strong: labels drawn thick and in colour before the others.
        path: PNG to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(panels) + 2.0, 4.6), layout="constrained")
    drawn = figure.subplots(1, max(1, len(panels)), squeeze=False, sharey=True)[0]
    labels = list(dict.fromkeys(label for curves in panels.values() for label in curves))
    weak = [label for label in labels if label not in strong]
    looks: dict[str, dict[str, Any]] = {
        label: {"color": (WARM[0], COLD[0], COLD[1])[i % 3], "linewidth": 2.4, "zorder": 4}
        for i, label in enumerate(strong)
    }
    shades = (*GREYS, COLD[2], *WARM[1:], COLD[3])
    for i, label in enumerate(weak):
        style = ("-", "--", ":", "-.")[i // len(shades) % 4]
        looks[label] = {"color": shades[i % len(shades)], "linewidth": 1.0, "linestyle": style}
    for axes, (title, curves) in zip(drawn, panels.items(), strict=False):
        for label, points in curves.items():
            values = [error if error > 0 else float("nan") for _, error in points]
            axes.plot([step for step, _ in points], values, label=label, **looks[label])
        axes.set_yscale("log")
        tidy(axes, title, "step (0 is pure noise)", "")
    drawn[0].set_ylabel("relative error of the feature")
    lines = {line.get_label(): line for axes in drawn for line in axes.get_lines()}
    order = [label for label in [*strong, *weak] if label in lines]
    figure.legend(
        [lines[label] for label in order],
        order,
        frameon=False,
        fontsize=8,
        loc="outside right center",
    )
    return save_figure(figure, path)


def plot_weights(
    weights: Float[Tensor, "T K"], steps: Sequence[int], columns: Sequence[int], path: Path
) -> Path:
    """Draw `weights_figure` into a PNG.

    Args:
        weights: one row per forecast step.
        steps: step index of each row.
        columns: step index of each column.
        path: PNG to write.
    """
    return save_figure(weights_figure(weights, steps, columns), path)


def weights_figure(
    weights: Float[Tensor, "T K"], steps: Sequence[int], columns: Sequence[int]
) -> "Figure":
    """The rows of a linear predictor as a heat map, blue below zero and red above.

    Args:
        weights: one row per forecast step; NaN where a column is not available yet.
        steps: step index of each row.
        columns: step index of each column.
    """
    from matplotlib.figure import Figure

    height = min(9.0, 1.6 + 0.16 * len(steps))
    figure = Figure(figsize=(min(9.0, 3.4 + 0.34 * len(columns)), height), layout="constrained")
    axes = figure.add_subplot()
    values = weights.detach().double().cpu()
    limit = float(values.nan_to_num().abs().max()) or 1.0
    image = axes.imshow(
        values.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", origin="upper"
    )
    axes.set_facecolor("#F2F2F2")
    every = max(1, len(steps) // 20)
    axes.set_yticks(range(0, len(steps), every), [str(step) for step in steps[::every]])
    every = max(1, len(columns) // 20)
    axes.set_xticks(range(0, len(columns), every), [str(step) for step in columns[::every]])
    axes.set_title("Weights of the forecast", loc="left", fontsize=11)
    axes.set_xlabel("weight on the feature of step")
    axes.set_ylabel("forecast of step")
    figure.colorbar(image, ax=axes, label="weight")
    return figure


def plot_cosines(matrices: Mapping[str, Float[Tensor, "S S"]], path: Path) -> Path:
    """How alike the features of every two steps are, a panel per tap.

    Args:
        matrices: tap to the cosine between the features of two steps.
        path: PNG to write.

    Raises:
        ValueError: there is no tap.
    """
    from matplotlib.figure import Figure

    if not matrices:
        raise ValueError("there is no tap whose steps could be compared.")
    figure = Figure(figsize=(1.0 + 3.7 * len(matrices), 3.6), layout="constrained")
    panels = figure.subplots(1, len(matrices), squeeze=False)[0]
    for axes, (tap, matrix) in zip(panels, matrices.items(), strict=True):
        image = axes.imshow(matrix.detach().double().cpu().numpy(), cmap="viridis")
        axes.set_title(f"{tap}: cosine between steps", loc="left", fontsize=10)
        axes.set_xlabel("step (0 is pure noise)")
        figure.colorbar(image, ax=axes, fraction=0.046)
    panels[0].set_ylabel("step")
    return save_figure(figure, path)


def plot_layer_motion(
    relative_change: Float[Tensor, "S L"],
    cosine: Float[Tensor, "S L"],
    fidelity: Float[Tensor, "S L"],
    path: Path,
) -> Path:
    """How the feature of each layer moves from step to step.

    Args:
        relative_change: ||F_t - F_(t-1)|| / ||F_(t-1)||; NaN where undefined, here and below.
        cosine: cosine between F_t and F_(t-1).
        fidelity: 1 - ||F_t - P F_t|| / ||F_t||, with P the projection on all earlier steps.
        path: PNG to write.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    panels = figure.subplots(1, 3)
    ramp = colormaps["viridis"].resampled(256)
    scale = Normalize(0, max(1, relative_change.shape[1] - 1))
    for axes, values, title in zip(
        panels,
        (relative_change, cosine, fidelity),
        ("relative change", "cosine to the previous step", "projection fidelity"),
        strict=True,
    ):
        for layer, line in enumerate(values.detach().double().cpu().T):
            axes.plot(line.numpy(), color=ramp(0.92 * scale(layer)), linewidth=1.2)
        tidy(axes, title, "step", "")
    panels[0].set_yscale("log")
    figure.colorbar(ScalarMappable(scale, ramp), ax=panels, label="layer", fraction=0.03, pad=0.01)
    return save_figure(figure, path)
