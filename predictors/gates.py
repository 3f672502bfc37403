"""The gates of LESA: B-splines over inputs, networks of them, and values kept while weights stay.

Shapes: n rows, I inputs, O outputs, P = G + 3 splines on G grid intervals, S sampling
steps, T = S + 1 times: those of the steps and the end.
Source: KAN, arXiv 2404.19756: y_o = sum_i a_io silu(x_i) + sum_ij c_ioj B_j(x_i), with G + 3 cubic
B-splines B_j on a grid of G intervals extended by 3 on either side. On a uniform grid they are
shifts of one function, so no recursion is needed.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn


def values_of(tensors: Iterable[Tensor]) -> list[Tensor]:
    """A copy of the values of tensors, one vector per device.

    Marks such as `data_ptr` and `_version` say nothing of a write through `.data`.
    """
    found: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault(tensor.device, []).append(tensor.detach().flatten())
    return [torch.cat(vectors) for vectors in found.values()]


def same_values(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Whether two results of `values_of` are equal."""
    return len(first) == len(second) and all(
        a.device == b.device and torch.equal(a, b) for a, b in zip(first, second, strict=True)
    )


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
