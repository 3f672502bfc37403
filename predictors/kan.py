"""pykan's layers in place of ours, to train with; the only file that imports pykan.

pykan's splines and initialisation define the model; what is deployed and saved is the closed form
in `gates.py`, which is the same function. Shapes: n rows, I inputs, O outputs.
Source: pykan 0.2.8, `KANLayer`.
"""

import contextlib
import copy
import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foreseer.predictors.gates import NOISE, SplineNet, in_chunks
from foreseer.predictors.lesa import LesaPredictor

CHUNK_NUMBERS = 2**20  # pykan holds a number per row and edge several times over
CHECK_ROWS = 256


class PykanNet(nn.Module):
    """`SplineNet` made of pykan's `KANLayer`, started as pykan does; random numbers stay untouched.

    Args:
        widths: number of inputs, then of the outputs of every layer.
        grid_size: grid intervals of every layer.
        grid_range: the grid of every layer covers -grid_range to grid_range; it stays as it is.
        seed: of the initialisation.
        zero_start: make the last layer, and so the net, zero.
    """

    def __init__(
        self,
        widths: Sequence[int],
        grid_size: int,
        grid_range: float,
        seed: int = 0,
        zero_start: bool = False,
    ) -> None:
        super().__init__()
        self.widths = tuple(widths)
        self.grid_size = grid_size
        self.grid_range = grid_range
        self.zero_start = zero_start
        pairs = list(zip(self.widths[:-1], self.widths[1:], strict=True))
        with same_random_state():
            torch.default_generator.manual_seed(seed)
            self.layers = nn.ModuleList(
                _kan_layer(a, b, grid_size, [-grid_range, grid_range]) for a, b in pairs
            )
        if zero_start:
            nn.init.zeros_(self.layers[-1].coef)  # type: ignore[arg-type]
            nn.init.zeros_(self.layers[-1].scale_base)  # type: ignore[arg-type]

    def forward(self, x: Float[Tensor, "n I"]) -> Float[Tensor, "n O"]:
        """The outputs of the last layer, computed a chunk of rows at a time."""
        edges = max(a * b for a, b in zip(self.widths[:-1], self.widths[1:], strict=True))
        return in_chunks(self._whole, x, max(1, CHUNK_NUMBERS // (edges * (self.grid_size + 3))))

    def _whole(self, x: Float[Tensor, "n I"]) -> Float[Tensor, "n O"]:
        for layer in self.layers:
            x = layer(x)[0]  # the others are what each edge made of it, for plots
        return x


def with_pykan(predictor: LesaPredictor, seed: int | None = None) -> LesaPredictor:
    """A copy with pykan's layers in place of ours.

    Args:
        predictor: one with splines in it; others come back as they are.
        seed: start the curves afresh from pykan's initialisation; None keeps them.
    """

    def swap(net: SplineNet, number: int) -> PykanNet:
        at = 0 if seed is None else seed + number
        other = PykanNet(net.widths, net.grid_size, net.grid_range, at, net.zero_start)
        other.to(net.layers[0].coef)  # type: ignore[arg-type]
        if seed is None:
            _copy_to_pykan(net, other)
        return other

    return _swapped(predictor, SplineNet, swap)


def without_pykan(predictor: LesaPredictor, tolerance: float = 1e-5) -> LesaPredictor:
    """A copy with our closed form in place of pykan's layers, checked against them.

    Args:
        predictor: as trained; the rest of it is copied as it is.
        tolerance: largest difference of the two forms, relative to the largest output beyond 1.

    Raises:
        ValueError: the two differ by more, or pykan's grid is not the uniform one any more.
    """

    def swap(net: PykanNet, number: int) -> SplineNet:
        other = splines_of(net)
        gap = difference(net, other)
        if not gap <= tolerance:
            raise ValueError(
                f"the closed form of net {number} differs from pykan's by {gap:.1e}, expected at "
                f"most {tolerance:.1e}: weights this large lose the digits; train in float64."
            )
        return other

    return _swapped(predictor, PykanNet, swap)


def splines_of(net: PykanNet) -> SplineNet:
    """The closed form of pykan's layers.

    Raises:
        ValueError: a grid is not the uniform one the net was built with.
    """
    with same_random_state():
        other = SplineNet(net.widths, net.grid_size, net.grid_range, net.zero_start)
    other.to(net.layers[0].coef)  # type: ignore[arg-type]
    for theirs, ours in zip(net.layers, other.layers, strict=True):
        _check_grid(theirs, net.grid_size, net.grid_range)
        scale: Tensor = theirs.scale_sp * theirs.mask  # type: ignore[operator]
        with torch.no_grad():
            ours.coef.copy_((theirs.coef * scale[..., None]).transpose(0, 1))  # type: ignore
            ours.base.copy_((theirs.scale_base * theirs.mask).mT)  # type: ignore
    return other


@contextlib.contextmanager
def same_random_state() -> Iterator[None]:
    """Put Python's and torch's random numbers back: pykan draws, and importing it does too."""
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(state)


def difference(net: PykanNet, other: SplineNet) -> float:
    """Largest difference of two forms over their range and beyond, relative to outputs above 1."""
    generator = torch.Generator().manual_seed(0)
    rows = 4 * torch.rand(CHECK_ROWS, net.widths[0], generator=generator) - 2
    x = (net.grid_range * rows).to(other.layers[0].coef)  # type: ignore[arg-type]
    with torch.no_grad():
        theirs, ours = net(x), other(x)
    return float((theirs - ours).abs().max() / theirs.abs().max().clamp(min=1.0))


def _kan_layer(num_in: int, num_out: int, grid_size: int, grid_range: list[float]) -> nn.Module:
    from kan.KANLayer import KANLayer  # two seconds and 200 MB, so only where it is trained

    return KANLayer(num_in, num_out, grid_size, 3, noise_scale=NOISE, grid_range=grid_range)


def _copy_to_pykan(net: SplineNet, other: PykanNet) -> None:
    with torch.no_grad():
        for ours, theirs in zip(net.layers, other.layers, strict=True):
            theirs.coef.copy_(ours.coef.transpose(0, 1))  # type: ignore
            theirs.scale_base.copy_(ours.base.mT)  # type: ignore
            theirs.scale_sp.fill_(1.0)  # type: ignore
            theirs.mask.fill_(1.0)  # type: ignore


def _check_grid(layer: Any, grid_size: int, grid_range: float) -> None:
    step = 2 * grid_range / grid_size
    expected = torch.arange(-3, grid_size + 4).to(layer.grid) * step - grid_range
    if (
        layer.k != 3
        or layer.grid.shape[1] != len(expected)
        or not torch.allclose(layer.grid, expected.expand_as(layer.grid), rtol=0, atol=1e-4 * step)
    ):
        raise ValueError(
            f"the grid of a layer is not {grid_size} equal intervals over +-{grid_range:g}; the "
            "closed form needs the grid it was built with, so never call update_grid."
        )


def _swapped(predictor: LesaPredictor, kind: type, swap: Any) -> LesaPredictor:
    """A copy with every net of a kind replaced, in order."""
    copied = copy.deepcopy(predictor)
    copied.folded.clear()
    places = [
        (parent, name, child)
        for parent in copied.modules()
        for name, child in parent.named_children()
        if isinstance(child, kind)
    ]
    for number, (parent, name, child) in enumerate(places):
        setattr(parent, name, swap(child, number))
    return copied
