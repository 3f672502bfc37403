"""Learned resampling: rows over the features of a coarse grid, for a run that goes on from them.

Shapes: A anchors of the run before, J operators, S steps, B rows, N fine tokens, D channels.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foreseer.predictors.base import History, Predictor, Step
from foreseer.predictors.weighted import combine

GRID_TOLERANCE = 1e-5


def child_corners(height: int, width: int) -> Int[Tensor, "5 N"]:
    """For every child of a token: the child of the parent, and of its four neighbours, by corner.

    The neighbours are the parent's next to the child, across and down, and those on its other side,
    so that the four children mirror each other; outside of the grid the parent stands for them.

    Args:
        height: of the fine grid, even.
        width: likewise.

    Raises:
        ValueError: a side is odd.
    """
    if height % 2 or width % 2:
        raise ValueError(
            f"found a grid of {height} x {width} tokens, expected even sides: four children of "
            "every token."
        )
    rows = torch.arange(height)[:, None].expand(height, width)
    columns = torch.arange(width)[None].expand(height, width)
    across, down = 2 * (columns % 2) - 1, 2 * (rows % 2) - 1
    moves = [(0 * down, 0 * across), (0 * down, across), (0 * down, -across), (down, 0 * across)]
    found = []
    for move_down, move_across in [*moves, (-down, 0 * across)]:
        row = (rows // 2 + move_down).clamp(0, height // 2 - 1)
        column = (columns // 2 + move_across).clamp(0, width // 2 - 1)
        found.append((2 * row * width + 2 * column).flatten())
    return torch.stack(found)


BASES = {"corners": child_corners}
"""Sets of up-sampling operators by name: the token of the copied grid that each reads."""
NUM_OPERATORS = {"corners": 5}


class Resampled(Predictor):
    """F_hat_t = sum_a sum_j W[branch, t, a, j] U_j F_a + sum_{b < t} V[branch, t, b] F_b.

    a are anchors of the run before, on a grid of half the sides, b those of this run, and U_j a
    basis of up-sampling operators. Starts as copies of the newest anchor's tokens.

    Args:
        num_steps: steps S of this run.
        anchors: steps at which the network runs; the first may be later than 0.
        before: anchors of the run before, steps of its own, rising.
        before_sigmas: flow time of every step of the run before, on its own clock.
        grid: height and width of this run's grid in tokens.
        num_branches: guidance branches.
        basis: of the operators, a key of `BASES`.

    Raises:
        ValueError: the steps are none of such runs, the grid is odd, or the basis is not known.
    """

    learned = True
    tag = "resampled"
    form = "weighted sums of up-sampled features of the stage before and"

    def __init__(
        self,
        num_steps: int,
        anchors: Sequence[int],
        before: Sequence[int],
        before_sigmas: Sequence[float],
        grid: Sequence[int],
        num_branches: int = 1,
        basis: str = "corners",
    ) -> None:
        super().__init__()
        for name, steps, end in (
            ("anchors", anchors, num_steps),
            ("before", before, len(before_sigmas)),
        ):
            steps = list(steps)
            if not steps or steps != sorted(set(steps)) or not 0 <= steps[0] <= steps[-1] < end:
                raise ValueError(f"{name} is {steps}, expected rising steps in [0, {end}).")
        if basis not in BASES or len(grid) != 2 or num_branches < 1:
            raise ValueError(
                f"found the basis {basis!r}, the grid {list(grid)} and {num_branches} branches; "
                f"expected one of {', '.join(BASES)}, a height and a width, and at least 1."
            )
        self.num_steps, self.num_branches, self.basis = num_steps, num_branches, basis
        self.anchors, self.before = tuple(anchors), tuple(before)
        self.before_sigmas, self.grid = tuple(before_sigmas), tuple(grid)
        self.continues = tuple(step - len(self.before_sigmas) for step in self.before)
        if any(side % 2 for side in self.grid):
            raise ValueError(f"the grid is {list(grid)}, expected even sides.")
        self._places: Int[Tensor, "J N"] | None = None  # made where they are first needed
        self.weight: Float[Tensor, "branches S A J"]
        self.own: Float[Tensor, "branches S S"]
        weight = torch.zeros(num_branches, num_steps, len(self.before), NUM_OPERATORS[basis])
        own = torch.zeros(num_branches, num_steps, num_steps)
        for t in range(num_steps):
            earlier = [anchor for anchor in self.anchors if anchor < t]
            if earlier:
                own[:, t, earlier[-1]] = 1.0
            else:
                weight[:, t, -1, 0] = 1.0
        self.register_buffer("weight", weight.double())
        self.register_buffer("own", own.double())

    @property
    def smallest(self) -> tuple[int, int]:
        """See the base class."""
        return self.grid[0] * self.grid[1], 1

    def size(self) -> str:
        """See the base class."""
        count = int((self.weight != 0).sum()) + int((self.own != 0).sum())
        return f"{count} non-zero weights"

    def check_before(self, sigmas: Sequence[float]) -> None:
        """See the base class.

        Raises:
            ValueError: the run before has other steps than in the fit.
        """
        pairs = zip(sigmas, self.before_sigmas, strict=False)
        if len(sigmas) != len(self.before_sigmas) or any(
            abs(found - told) > GRID_TOLERANCE for found, told in pairs
        ):
            raise ValueError(
                f"this {type(self).__name__} was fitted after a stage of "
                f"{len(self.before_sigmas)} steps from flow time {self.before_sigmas[0]:g} to "
                f"{self.before_sigmas[-1]:g}, this one has {len(sigmas)} steps from {sigmas[0]:g} "
                f"to {sigmas[-1]:g}; use its num_inference_steps and switch, or fit again."
            )

    def places(self, device: torch.device | str = "cpu") -> Int[Tensor, "J N"]:
        """The tokens that the operators read, see `BASES`."""
        if self._places is None or self._places.device != torch.device(device):
            self._places = BASES[self.basis](*self.grid).to(device)
        return self._places

    def up_sampled(self, feature: Float[Tensor, "B N D"], operator: int) -> Float[Tensor, "B N D"]:
        """U_j of a feature that was brought to the fine grid by copying.

        Args:
            feature: copies of the parents' tokens.
            operator: j.

        Raises:
            ValueError: it is of another grid.
        """
        if feature.shape[1] != self.grid[0] * self.grid[1]:
            raise ValueError(
                f"the feature has {feature.shape[1]} tokens, this {type(self).__name__} was fitted "
                f"on a grid of {self.grid[0]} x {self.grid[1]}."
            )
        return feature.index_select(1, self.places(feature.device)[operator])

    def forward(self, history: History, step: Step) -> Float[Tensor, "B N D"]:
        """The sum, see the class.

        Raises:
            ValueError: a branch or step the rows do not have, or an anchor is missing.
        """
        own = [anchor for anchor in self.anchors if anchor < step.index]
        held = dict(zip(history.steps, history.features, strict=True))
        expected = [*self.continues, *own]
        known = step.index < self.num_steps and max(step.branches) < self.num_branches
        if not known or not set(expected) <= set(held):
            raise ValueError(
                f"the history holds the steps {history.steps} at step {step.index} of branch "
                f"{max(step.branches)}, the rows are for the steps {expected} and "
                f"{self.num_branches} branch(es); the stage before has to compute its own "
                f"anchors, {list(self.before)}, and this one {list(self.anchors)}."
            )
        branches = list(step.branches)
        weights = self.weight[branches, step.index]  # (branches, A, J)
        coarse = [held[anchor] for anchor in self.continues]
        total: Tensor | None = None
        for operator in range(weights.shape[-1]):
            each = weights[..., operator].T  # (A, branches)
            if bool(each.any()):
                term = self.up_sampled(combine(each, coarse), operator)
                total = term if total is None else total + term
        if own and bool((rows := self.own[branches, step.index][:, own].T).any()):
            term = combine(rows, [held[anchor] for anchor in own])
            total = term if total is None else total + term
        return torch.zeros_like(history.features[-1]) if total is None else total
