"""Kolmogorov-Arnold networks with cubic B-splines on a uniform grid, in closed form.

Shapes: n rows, I inputs, O outputs, P = G + 3 splines on G grid intervals.
Source: KAN, arXiv 2404.19756: y_o = sum_i a_io silu(x_i) + sum_ij c_ioj B_j(x_i), with G + 3 cubic
B-splines B_j on a grid of G intervals extended by 3 on either side. On a uniform grid they are
shifts of one function, so no recursion is needed.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

CHUNK_ROWS = 2048  # keeps the splines of a chunk in the processor's cache
NOISE = 0.02  # published size of the splines at the start, over the number of intervals


class SplineLayer(nn.Module):
    """One layer: every input acts on every output through its own curve.

    Beyond the grid the splines fall to 0 within 3 intervals and only a_io silu(x_i) remains. Starts
    with a_io uniform in +-1 / sqrt(in), as pykan does, and small splines.

    Args:
        num_in: inputs.
        num_out: outputs.
        grid_size: grid intervals G, at least 1.
        grid_range: the grid covers -grid_range to grid_range.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, num_in: int, num_out: int, grid_size: int, grid_range: float) -> None:
        super().__init__()
        if min(num_in, num_out, grid_size) < 1 or not grid_range > 0:
            raise ValueError(
                f"found {num_in} inputs, {num_out} outputs, {grid_size} intervals over "
                f"+-{grid_range}; expected at least one of each and a positive range."
            )
        self.grid_size = grid_size
        self.grid_range = grid_range
        self.coef: Float[Tensor, "O I P"]
        self.coef = nn.Parameter(torch.empty(num_out, num_in, grid_size + 3))
        self.base: Float[Tensor, "O I"]
        self.base = nn.Parameter(torch.empty(num_out, num_in))
        bound = num_in**-0.5
        noise = bound * NOISE / (2 * grid_size)
        nn.init.uniform_(self.base, -bound, bound)
        nn.init.uniform_(self.coef, -noise, noise)

    def forward(self, x: Float[Tensor, "I n"]) -> Float[Tensor, "O n"]:
        """The outputs; rows come last, so that an input's splines lie side by side."""
        six_splines = six_cubic_splines(x, self.grid_size, self.grid_range)
        curves = (self.coef / 6).flatten(1) @ six_splines.flatten(0, 1)
        return torch.addmm(curves, self.base, nn.functional.silu(x))


class SplineNet(nn.Module):
    """Layers one after the other.

    Args:
        widths: number of inputs, then of the outputs of every layer.
        grid_size: grid intervals of every layer.
        grid_range: the grid of every layer covers -grid_range to grid_range.
        zero_start: make the last layer, and so the net, zero.
    """

    def __init__(
        self,
        widths: Sequence[int],
        grid_size: int,
        grid_range: float,
        zero_start: bool = False,
    ) -> None:
        super().__init__()
        self.widths = tuple(widths)
        self.grid_size = grid_size
        self.grid_range = grid_range
        self.zero_start = zero_start
        pairs = zip(self.widths[:-1], self.widths[1:], strict=True)
        self.layers = nn.ModuleList(SplineLayer(a, b, grid_size, grid_range) for a, b in pairs)
        if zero_start:
            for parameter in self.layers[-1].parameters():
                nn.init.zeros_(parameter)

    def forward(self, x: Float[Tensor, "n I"]) -> Float[Tensor, "n O"]:
        """The outputs of the last layer, computed a chunk of rows at a time."""
        return in_chunks(self._whole, x, CHUNK_ROWS)

    def _whole(self, x: Float[Tensor, "n I"]) -> Float[Tensor, "n O"]:
        columns = x.mT.contiguous()
        for layer in self.layers:
            columns = layer(columns)
        return columns.mT


def six_cubic_splines(
    x: Float[Tensor, "I n"], grid_size: int, grid_range: float
) -> Float[Tensor, "I P n"]:
    """Six times every cubic B-spline of a uniform grid at x.

    6 B_j(x) = relu(2 - |u - j|)^3 - 4 relu(1 - |u - j|)^3 with u = x in grid intervals, so that the
    grid's knots are -G/2 to G/2, and j from -G/2 - 1 to G/2 + 1.
    """
    place = x * (grid_size / (2 * grid_range))
    centres = torch.arange(-1, grid_size + 2, device=x.device, dtype=x.dtype) - grid_size / 2
    outer = torch.rsub((place[:, None] - centres[:, None]).abs_(), 2).clamp_(min=0)
    inner = (outer - 1).clamp_(min=0)
    return (outer * outer).mul_(outer).addcmul_(inner * inner, inner, value=-4)


def in_chunks(
    function: Callable[[Tensor], Tensor], x: Float[Tensor, "n I"], rows: int
) -> Float[Tensor, "n O"]:
    """A function of rows, computed so many at a time."""
    if len(x) <= rows:
        return function(x)
    return torch.cat([function(part) for part in x.split(rows)])
