"""Radial frequency bands of a token grid.

Shapes: B batch, N tokens, D channels, P bands, S sampling steps.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from foreseer.predictors.partition import ChannelGroups, Partition
from foreseer.predictors.token_groups import TokenGroups
from foreseer.predictors.weighted import wide_dtype

OF_CALLS = "numbers"  # of a partition: what every call brings


class Bands(Partition):
    """Radial frequency bands of a token grid, under an orthonormal DCT-II or a Fourier transform.

    The radius of a frequency is its norm in cycles per token, relative to the highest of the grid.
    Features are tokens (B, N, D), N = prod(grid) in row-major order, or maps (B, C, *grid).

    Args:
        edges: rising radii in (0, 1) between the bands; band p holds edges[p-1] <= radius <
            edges[p], and band 0 the mean. None at all is a single band.
        grid: (height, width) in tokens, or (frames, height, width).
        transform: `dct` or `fft`.

    Raises:
        ValueError: an argument is out of range, or a band holds no frequency of this grid.
    """

    kind = "frequency bands"

    def __init__(self, edges: Sequence[float], grid: Sequence[int], transform: str = "dct") -> None:
        self.edges = tuple(float(edge) for edge in edges)
        self.grid = tuple(grid)
        self.transform = transform
        if list(self.edges) != sorted(set(self.edges)) or not all(0 < e < 1 for e in self.edges):
            raise ValueError(f"edges are {list(self.edges)}, expected rising radii in (0, 1).")
        if len(self.grid) not in (2, 3) or not all(size >= 1 for size in self.grid):
            raise ValueError(
                f"grid is {list(self.grid)}, expected (height, width) or (frames, height, width)."
            )
        if transform not in ("dct", "fft"):
            raise ValueError(f"transform is {transform!r}, expected 'dct' or 'fft'.")
        self.num_parts = len(self.edges) + 1
        self.num_tokens = 1
        for size in self.grid:
            self.num_tokens *= size
        self.smallest = (self.num_tokens, 1)
        bounds = torch.tensor(self.edges, dtype=torch.float64, device="cpu")
        self.bands = torch.bucketize(
            self._radii(), bounds, right=True
        )  # (*grid), one per frequency
        empty = sorted(set(range(self.num_parts)) - set(self.bands.flatten().tolist()))
        if empty:
            raise ValueError(
                f"the bands {empty} hold no frequency of the grid {list(self.grid)} with the edges "
                f"{list(self.edges)}; use fewer bands."
            )
        self._matrices: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}

    def _radii(self) -> Float[Tensor, " *grid"]:
        """Radius of every frequency, the highest is 1."""
        squared = torch.zeros(self.grid, dtype=torch.float64, device="cpu")
        for axis, size in enumerate(self.grid):
            index = torch.arange(size, dtype=torch.float64, device="cpu")
            frequency = index / 2 if self.transform == "dct" else torch.minimum(index, size - index)
            shape = [-1 if other == axis else 1 for other in range(len(self.grid))]
            squared += (frequency / size).square().view(shape)
        highest = squared.max()
        return (squared / (highest if highest > 0 else 1.0)).sqrt()

    def check(self, feature: Float[Tensor, " B *shape"]) -> None:
        """Raise unless a feature lies on the grid."""
        shape = tuple(feature.shape)
        tokens = len(shape) == 3 and shape[1] == self.num_tokens
        if not tokens and (len(shape) != 2 + len(self.grid) or shape[2:] != self.grid):
            raise ValueError(
                f"found a feature of shape {shape}, but the bands are for the grid "
                f"{list(self.grid)}: tokens (B, {self.num_tokens}, D) or maps (B, C, *grid). Use "
                "the grid of this resolution, or leave out the tokens that are not the image's."
            )

    def weigh(self, combined: Sequence[Float[Tensor, " B *shape"]]) -> Float[Tensor, " B *shape"]:
        """u_0 + sum_{p>0} P_p (u_p - u_0): a transform per part but the first, one back."""
        first = combined[0]
        self.check(first)
        if self.num_parts == 1:
            return first
        spectrum: Tensor | None = None
        for part, other in enumerate(combined[1:], start=1):
            change = self._forward(self._maps((other - first).to(wide_dtype(first))))
            bands = self.bands[..., : change.shape[-1]].to(change.device)
            change = change * (bands == part)
            spectrum = change if spectrum is None else spectrum + change
        assert spectrum is not None  # there are two parts at least
        maps = self._backward(spectrum)
        tokens = first.ndim == 3
        return first + (maps.flatten(2).mT if tokens else maps).to(first.dtype)

    def grams(self, features: Float[Tensor, " S *shape"]) -> Float[Tensor, "P S S"]:
        """Grams of the bands, channel by channel, as the transform keeps inner products."""
        self.check(features)
        num_steps = len(features)
        total = torch.zeros(self.num_parts, num_steps, num_steps, dtype=torch.float64)
        bands = self.bands.to(features.device)
        axes = tuple(range(-len(self.grid), 0))
        for channels in self._maps(features).split(16, dim=1):  # a small copy in float64 at a time
            maps = channels.double()
            spectrum = (
                self._forward(maps)
                if self.transform == "dct"
                else torch.view_as_real(torch.fft.fftn(maps, dim=axes, norm="ortho"))
            )
            for part in range(self.num_parts):
                inside = spectrum[:, :, bands == part].flatten(1)
                total[part] += (inside @ inside.mT).cpu()
        return total

    def describe(self) -> dict[str, Any]:
        """The constructor's arguments and the class."""
        return {
            "class": "Bands",
            "edges": list(self.edges),
            "grid": list(self.grid),
            "transform": self.transform,
        }

    def _maps(self, feature: Tensor) -> Float[Tensor, "B D *grid"]:
        """The feature with the grid's axes last."""
        return feature.mT.unflatten(-1, self.grid) if feature.ndim == 3 else feature

    def _forward(self, maps: Tensor) -> Tensor:
        """The spectrum over the last axes; half of it for the Fourier transform of a real map."""
        if self.transform == "fft":
            return torch.fft.rfftn(maps, dim=tuple(range(-len(self.grid), 0)), norm="ortho")
        return _along(maps, self._cosines(maps))

    def _backward(self, spectrum: Tensor) -> Tensor:
        """The map of a spectrum."""
        if self.transform == "fft":
            axes = tuple(range(-len(self.grid), 0))
            return torch.fft.irfftn(spectrum, s=self.grid, dim=axes, norm="ortho")
        return _along(spectrum, [matrix.mT for matrix in self._cosines(spectrum)])

    def _cosines(self, maps: Tensor) -> list[Tensor]:
        """The DCT's matrix of every axis, kept per device and dtype."""
        key = (maps.device, maps.dtype)
        if key not in self._matrices:
            self._matrices[key] = [cosine_matrix(size).to(*key) for size in self.grid]
        return self._matrices[key]


def equal_bands(num_bands: int, grid: Sequence[int], transform: str = "dct") -> Bands:
    """Bands of equal width in radius.

    Args:
        num_bands: number of bands, >= 1.
        grid: see `Bands`.
        transform: see `Bands`.
    """
    return Bands([p / num_bands for p in range(1, num_bands)], grid, transform)


def cosine_matrix(size: int) -> Float[Tensor, "size size"]:
    """The orthonormal DCT-II: C[k, n] = sqrt(2 / size) cos(pi (2n + 1) k / (2 size)), C[0] / sqrt2.

    Ahmed, Natarajan & Rao, 1974; float64.
    """
    n = torch.arange(size, dtype=torch.float64, device="cpu")
    matrix = (2 / size) ** 0.5 * torch.cos(torch.pi * (2 * n + 1) * n[:, None] / (2 * size))
    matrix[0] /= 2**0.5
    return matrix


def _along(maps: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Multiply each of the last axes by its matrix."""
    for axis, matrix in zip(range(-len(matrices), 0), matrices, strict=True):
        maps = (maps.movedim(axis, -1) @ matrix.mT).movedim(-1, axis)
    return maps


def partition_from(description: Mapping[str, Any]) -> Partition:
    """The partition that `describe` told of.

    Raises:
        ValueError: it names no partition, or has other arguments.
    """
    known: dict[str, type[Bands] | type[ChannelGroups] | type[TokenGroups]]
    known = {"Bands": Bands, "ChannelGroups": ChannelGroups, "TokenGroups": TokenGroups}
    arguments = {name: value for name, value in description.items() if name != "class"}
    name = description.get("class")
    if name not in known:
        raise ValueError(f"found the partition {name!r}, expected one of {sorted(known)}.")
    takes = sorted(set(inspect.signature(known[name]).parameters) - {OF_CALLS})
    if sorted(arguments) != takes:
        raise ValueError(f"found {name} with {sorted(arguments)}, expected {takes}.")
    return known[name](**arguments)
