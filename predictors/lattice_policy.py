"""A lattice of tokens is computed and the rest interpolated: JiT, with a past for the rest.

Shapes: B samples, M = branches * B rows of a call, N = frames * h * w tokens, n computed ones, u
others, D channels.
Source: JiT, arXiv 2603.10744, whose velocity of tokens that are not computed is an interpolation of
computed neighbours; what a token's own past adds is ours.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foreseer.predictors.base import Grid
from foreseer.predictors.innovation import Innovation
from foreseer.predictors.tokens import TokenPolicy, flat_index, take

SHARES = (0.25, 0.5, 1.0)
NEIGHBOURS = 4  # computed tokens around one that is not, at most


class LatticePolicy(TokenPolicy):
    """Every second row and column, or every second token, or all are computed.

    F[i] = fresh_i at computed tokens, elsewhere past F_hat[i] + gain (U fresh - past U F_hat)[i].
    U averages the computed tokens among the eight around i: linear interpolation. `past` 0 and
    `gain` 1 are JiT's rule. The forecast F_hat is the predictor's; fitted on each token's own
    anchors its row is the learned past (`TokenRows` has past and gain of every step with it).

    Args:
        share: of the tokens that are computed: 0.25, 0.5 (a chequerboard) or 1.
        past: share of the forecasts, see `Innovation`.
        gain: share of the neighbours' change.
        pattern: see the base class.

    Raises:
        ValueError: the share is another, or see the base class.
    """

    wants_grid = True

    def __init__(
        self,
        share: float = 0.25,
        past: float = 1.0,
        gain: float = 1.0,
        pattern: Sequence[bool] = (True,),
    ) -> None:
        if share not in SHARES:
            raise ValueError(
                f"share is {share}, expected one of {', '.join(map(str, SHARES))}: a lattice of "
                "every second row and column, every second token, or all."
            )
        self.share = share
        self.innovation = Innovation(past, gain)
        super().__init__(0, pattern)

    def reset(self) -> None:
        """Forget the grid."""
        super().reset()
        self.computed, self.others = torch.empty(0).long(), torch.empty(0).long()
        self.around, self.weights = torch.empty(0).long(), torch.empty(0)
        self.step_index = 0

    def lay_out(self, grid: Grid) -> None:
        """Find the lattice and the neighbours of the others."""
        inside = lattice(self.share, grid).flatten()
        self.computed = inside.nonzero().flatten()
        self.others = (~inside).nonzero().flatten()
        self.around, self.weights = neighbours(inside, grid)

    def select(self, step_index: int) -> Int[Tensor, "B n"]:
        """The lattice, of every sample."""
        self.step_index = step_index
        return self.computed.to(self.device).repeat(self.num_samples, 1)

    def merge(
        self,
        forecast: Float[Tensor, "M N D"],
        fresh: Float[Tensor, "M n D"],
        selected: Int[Tensor, "M n"],
        branches: tuple[int, ...] = (0,),
    ) -> Float[Tensor, "M N D"]:
        """Computed tokens and what follows for the others, see the class."""
        merged = forecast.clone()
        places = flat_index(selected, forecast.shape[1])
        merged.flatten(0, 1).index_copy_(0, places, fresh.flatten(0, 1).to(forecast.dtype))
        if len(self.others):
            own, near, own_near = self.beside(forecast, fresh, selected)
            moved = self.innovation(own, near, own_near, branches, self.step_index)
            merged[:, self.others.to(forecast.device)] = moved.to(forecast.dtype)
        return merged

    def beside(
        self,
        forecast: Float[Tensor, "M N D"],
        fresh: Float[Tensor, "M n D"],
        selected: Int[Tensor, "M n"],
    ) -> tuple[Float[Tensor, "M u D"], Float[Tensor, "M u D"], Float[Tensor, "M u D"]]:
        """Of the tokens that are not computed: the forecast, U fresh and U forecast."""
        own = forecast[:, self.others.to(forecast.device)]
        return own, self._around(fresh), self._around(take(forecast, selected))

    def _around(self, rows: Float[Tensor, "M n D"]) -> Float[Tensor, "M u D"]:
        wide = torch.promote_types(rows.dtype, torch.float32)
        around, weights = self.around.to(rows.device), self.weights.to(rows.device, wide)
        total = torch.zeros(len(rows), len(around), rows.shape[2], dtype=wide, device=rows.device)
        for slot in range(around.shape[1]):
            total.addcmul_(rows[:, around[:, slot]].to(wide), weights[:, slot, None])
        return total

    def describe(self) -> dict[str, Any]:
        """The class and what a fit keeps of it."""
        return {"class": "LatticePolicy", "share": self.share, "pattern": list(self.pattern)}


def lattice(share: float, grid: Grid) -> Tensor:
    """Which tokens are computed, `(frames, h, w)`; the first row and column always are."""
    frames, height, width = grid
    row, column = torch.arange(height)[:, None], torch.arange(width)[None]
    if share == 1.0:
        inside = torch.ones(height, width, dtype=torch.bool)
    elif share == 0.5:
        inside = (row + column) % 2 == 0
    else:
        inside = (row % 2 == 0) & (column % 2 == 0)
    return inside.expand(frames, height, width)


def neighbours(
    inside: Tensor, grid: Grid
) -> tuple[Int[Tensor, "u slots"], Float[Tensor, "u slots"]]:
    """Computed tokens among the eight around each other token, and their equal weights.

    Args:
        inside: which tokens are computed, flat.
        grid: their grid.

    Returns:
        Numbers among the computed tokens, and weights that are 0 where there are fewer.
    """
    number = torch.full((*grid[:1], grid[1] + 2, grid[2] + 2), -1)
    ranks = torch.where(inside, inside.cumsum(0) - 1, -1).view(grid)
    number[:, 1:-1, 1:-1] = ranks
    shifts = [(y, x) for y in range(3) for x in range(3) if (y, x) != (1, 1)]
    around = torch.stack(
        [number[:, y : y + grid[1], x : x + grid[2]].flatten() for y, x in shifts], 1
    )[~inside]
    around = around.sort(1, descending=True).values[:, :NEIGHBOURS]
    known = around >= 0
    return around.clamp(min=0), known / known.sum(1, keepdim=True)
