"""Kolmogorov-Arnold networks with cubic B-splines on a uniform grid, in closed form.

Shapes: n rows, G grid intervals.
Source: KAN, arXiv 2404.19756: y_o = sum_i a_io silu(x_i) + sum_ij c_ioj B_j(x_i), with G + 3 cubic
B-splines B_j on a grid of G intervals extended by 3 on either side. On a uniform grid they are
shifts of one function, so no recursion is needed.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

CHUNK_ROWS = 2048  # keeps the basis of a chunk in the processor's cache


class SplineLayer(nn.Module):
    """One layer: every input acts on every output through its own curve.

    Beyond the grid the splines fall to 0 within 3 intervals and only a_io silu(x_i) remains.

    Args:
        num_in: inputs.
        num_out: outputs.
        grid_size: grid intervals G, at least 1.
        grid_range: the grid covers -grid_range to grid_range.
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
        self.coef: Float[Tensor, "G+3 in out"]
        self.coef = nn.Parameter(torch.empty(grid_size + 3, num_in, num_out))
        self.base: Float[Tensor, "in out"] = nn.Parameter(torch.empty(num_in, num_out))
        nn.init.uniform_(self.base, -(num_in**-0.5), num_in**-0.5)
        nn.init.uniform_(self.coef, -0.002 * num_in**-0.5, 0.002 * num_in**-0.5)

    def forward(self, x: Float[Tensor, "n in"]) -> Float[Tensor, "n out"]:
        """The outputs."""
        basis = cubic_basis(x, self.grid_size, self.grid_range)  # (n, G+3, in)
        curves = basis.flatten(1) @ self.coef.flatten(0, 1)
        return torch.addmm(curves, nn.functional.silu(x), self.base)


class SplineNet(nn.Module):
    """Layers one after the other.

    Args:
        widths: number of inputs, of the outputs of every layer; at least two numbers.
        grid_size: grid intervals of every layer.
        grid_range: the grid covers -grid_range to grid_range.
    """

    def __init__(self, widths: Sequence[int], grid_size: int, grid_range: float) -> None:
        super().__init__()
        self.widths = tuple(widths)
        self.grid_size = grid_size
        self.grid_range = grid_range
        pairs = zip(widths[:-1], widths[1:], strict=True)
        self.layers = nn.ModuleList(SplineLayer(a, b, grid_size, grid_range) for a, b in pairs)

    def forward(self, x: Float[Tensor, "n in"]) -> Float[Tensor, "n out"]:
        """The outputs of the last layer, computed a chunk of rows at a time."""
        return in_chunks(self._whole, x)

    def _whole(self, x: Float[Tensor, "n in"]) -> Float[Tensor, "n out"]:
        for layer in self.layers:
            x = layer(x)
        return x


def cubic_basis(
    x: Float[Tensor, "n in"], grid_size: int, grid_range: float
) -> Float[Tensor, "n G+3 in"]:
    """All cubic B-splines of a uniform grid: B_j(x) = b(u - j), u the grid coordinate.

    b(a) = (relu(2 - |a|)^3 - 4 relu(1 - |a|)^3) / 6, centred on the inner knots of the extended
    grid.
    """
    step = 2 * grid_range / grid_size
    centres = torch.arange(-1, grid_size + 2, device=x.device, dtype=x.dtype)
    place = (x + grid_range) / step
    outer = (2 - (place[:, None] - centres[:, None]).abs()).clamp(min=0)
    inner = (outer - 1).clamp(min=0)
    return (outer**3 - 4 * inner**3) / 6


def in_chunks(
    function: Callable[[Tensor], Tensor], x: Float[Tensor, "n in"], rows: int = CHUNK_ROWS
) -> Float[Tensor, "n out"]:
    """A function of rows, computed so many at a time."""
    if len(x) <= rows:
        return function(x)
    return torch.cat([function(part) for part in x.split(rows)])
