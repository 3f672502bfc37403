"""The gate of LESA over flow time, as a figure."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def gate_figure(
    alpha: Float[Tensor, "branches S"],
    sigmas: Sequence[float],
    boundaries: Sequence[float],
    anchors: Sequence[int],
) -> "Figure":
    """The gate over sigma at the forecast steps, a curve per branch, a dashed line per boundary.

    Args:
        alpha: gate of every step.
        sigmas: flow time of every step.
        boundaries: between the stages, in flow time.
        anchors: steps at which the network runs: the gate is not used there.
    """
    from matplotlib.figure import Figure

    forecast = [step for step in range(len(sigmas)) if step not in anchors]
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for branch, curve in enumerate(alpha.detach().float().cpu()):
        times = [sigmas[step] for step in forecast]
        axes.plot(times, curve[forecast].tolist(), ".-", label=f"branch {branch}")
    for boundary in boundaries:
        axes.axvline(boundary, color="gray", linestyle="--", linewidth=0.8)
    axes.invert_xaxis()
    axes.set_xlabel("flow time sigma")
    axes.set_ylabel("gate alpha")
    axes.legend()
    return figure
