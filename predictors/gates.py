"""The gate of an expert: one number from the differences between a step's flow time and all others.

Shapes: S sampling steps, T = S + 1 times: those of the steps and the end.
"""

import itertools
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foreseer.predictors.splines import SplineNet

GATES = ("kan", "mlp", "table")
PER_EDGE = 5  # pykan trains grid_size + 3 coefficients and two scales per edge


def build_gate(
    kind: str, num_in: int, hidden: Sequence[int], grid_size: int, grid_range: float
) -> nn.Module:
    """A net from `num_in` numbers to one, near 1 at the start: filters see a gradient at once.

    Args:
        kind: `kan` or `mlp`.
        num_in: inputs.
        hidden: widths of the hidden layers of the KAN; those of the perceptron are scaled up until
            it has as many weights.
        grid_size: intervals of the spline grid.
        grid_range: the spline grid covers -grid_range to grid_range.

    Raises:
        ValueError: a perceptron without a hidden layer cannot be given a size.
    """
    widths = (num_in, *hidden, 1)
    if kind == "kan":
        net = SplineNet(widths, grid_size, grid_range)
        with torch.no_grad():  # the splines of an input sum to 1 within the grid
            net.layers[-1].coef.add_(1 / widths[-2])  # type: ignore[operator]
        return net
    if not hidden:
        raise ValueError("found no hidden widths, expected at least one for the gate 'mlp'.")
    size = (grid_size + PER_EDGE) * sum(a * b for a, b in itertools.pairwise(widths))
    widths = perceptron_widths(widths, size)
    layers: list[nn.Module] = []
    for num_in, num_out in itertools.pairwise(widths):
        layers += [nn.Linear(num_in, num_out), nn.SiLU()]
    nn.init.ones_(layers[-2].bias)  # type: ignore[arg-type]
    return nn.Sequential(*layers[:-1])


def perceptron_widths(widths: Sequence[int], size: int) -> tuple[int, ...]:
    """Widths with the hidden ones scaled up until a perceptron has `size` weights or more."""
    for scale in itertools.count(16):
        inner = [-(-scale * width // 16) for width in widths[1:-1]]
        scaled = (widths[0], *inner, widths[-1])
        if sum((a + 1) * b for a, b in itertools.pairwise(scaled)) >= size:
            break
    return scaled


def time_differences(sigmas: Sequence[float]) -> Float[Tensor, "S T"]:
    """Flow time of every step minus that of every step and of the end of the run, 0; float64."""
    times = torch.tensor([*sigmas, 0.0], dtype=torch.float64, device="cpu")
    return times[:-1, None] - times


def check_stages(boundaries: Sequence[float], taps: Sequence[int]) -> None:
    """Raise unless there is a number of taps for every stage.

    Raises:
        ValueError: the boundaries do not fall, or another number of taps, or none.
    """
    falling = all(a > b for a, b in itertools.pairwise(boundaries))
    if not falling or len(taps) != len(boundaries) + 1 or min(taps) < 1:
        raise ValueError(
            f"found boundaries {list(boundaries)} and taps {list(taps)}, expected falling "
            "boundaries and one number of taps >= 1 more than there are boundaries."
        )
