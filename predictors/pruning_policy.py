"""Tokens are left out of self-attention and get its output back from others: DaTo.

Shapes: B samples, N = frames * h * w tokens, b base tokens, k kept ones, p pruned ones, M tokens of
the output, P elements of each, C channels.
Source: DaTo, arXiv 2501.00375, written from its formulas; the learned recovery is ours.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foreseer.predictors.base import Grid
from foreseer.predictors.innovation import Innovation
from foreseer.predictors.tokens import TokenPolicy, flat_index, take

CHUNK = 2**20  # cosines in memory at once, so that no N x N matrix is
MOST = 0.75  # base tokens, a quarter, are always kept


@dataclass(frozen=True)
class Choice:
    """Which tokens take part in an attention, and who speaks for the others.

    Args:
        kept: their numbers, rising.
        pruned: the other tokens.
        partner: of each pruned token the most similar kept one, its place in `kept`.
    """

    kept: Int[Tensor, "B k"]
    pruned: Int[Tensor, "B p"]
    partner: Int[Tensor, "B p"]

    def repeat(self, branches: int) -> "Choice":
        """The same for all branches of every sample."""
        return Choice(
            *(each.repeat(branches, 1) for each in (self.kept, self.pruned, self.partner))
        )


class PruningPolicy(TokenPolicy):
    """Tokens much like another one take no part in self-attention, at every step that is computed.

    diff_i = mean_c |out_{t-1} - out_{t-2}|_{c,i}, score_i = dynamics diff_i + noise eps_i: the best
    of every 2 x 2 patch is a *base* token. Of the others the `ratio` N with the largest cosine to
    a base token, by what enters the attention, are pruned; the rest is kept. Attention runs on the
    kept tokens; a pruned token i with its most similar kept token n gets
    A_i = past A_hat_i + gain (A_n - past A_hat_n), A_hat the rule's forecast of its own attention
    output. `past` 0 and `gain` 1 are DaTo's copy.

    MLPs and cross-attention run on all tokens. A run's first step is computed in full: it tells
    the guidance branches and the grid. The first branch's choice holds for all branches of a step.

    Args:
        ratios: share of the tokens that is pruned, in [0, 0.75], or one for every step of the run,
            the first of them 0.
        past: share of the forecasts, see `Innovation`.
        gain: share of the kept token's change.
        dynamics: weight of the differences, >= 0.
        noise: weight of the random numbers, >= 0.
        every_block: whether each block's attention has a choice of its own, as in the release;
            else the first block's serves all, which saves the cosines.
        seed: see the base class.

    Raises:
        ValueError: an argument is out of range.
    """

    wants_grid = True

    def __init__(
        self,
        ratios: float | Sequence[float] = 0.4,
        past: float = 0.0,
        gain: float = 1.0,
        dynamics: float = 0.1,
        noise: float = 0.1,
        every_block: bool = True,
        seed: int = 0,
    ) -> None:
        each = [ratios] if isinstance(ratios, int | float) else list(ratios)
        if not each or not all(0 <= ratio <= MOST for ratio in each):
            raise ValueError(
                f"ratios are {ratios}, expected numbers in [0, {MOST}]: a quarter of the tokens, "
                "one of every 2 x 2 patch, is always kept."
            )
        if not isinstance(ratios, int | float) and each[0] != 0:
            raise ValueError(
                f"the ratio of step 0 is {each[0]}, expected 0: a run's first step is computed in "
                "full."
            )
        weights = dynamics, noise
        if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
            raise ValueError(
                f"found dynamics {dynamics} and noise {noise}, expected finite numbers >= 0."
            )
        self.ratios = float(ratios) if isinstance(ratios, int | float) else tuple(each)
        self.dynamics, self.noise, self.every_block = dynamics, noise, every_block
        self.innovation = Innovation(past, gain)
        super().__init__(seed, (False,))

    def reset(self) -> None:
        """Forget the outputs and the grid."""
        super().reset()
        self.grid: Grid = (0, 0, 0)
        self.outputs: list[Tensor] = []

    def prepare(
        self, groups: Int[Tensor, "B N"] | None, anchors: Collection[int], num_steps: int
    ) -> None:
        """Check the ratios against the run.

        Raises:
            ValueError: there are others than steps.
        """
        if isinstance(self.ratios, tuple) and len(self.ratios) != num_steps:
            raise ValueError(
                f"there are {len(self.ratios)} ratios for a run of {num_steps} steps; give one per "
                "step, or one number for all."
            )

    def lay_out(self, grid: Grid) -> None:
        """Take the grid.

        Raises:
            ValueError: it leaves fewer tokens than are to be pruned.
        """
        self.grid = grid
        base = grid[0] * math.ceil(grid[1] / 2) * math.ceil(grid[2] / 2)
        size = math.prod(grid)
        most = max(self.ratios) if isinstance(self.ratios, tuple) else self.ratios
        if int(most * size) > size - base:
            raise ValueError(
                f"{int(most * size)} of {size} tokens on the grid {grid} are to be pruned, but "
                f"{base} are the best of their 2 x 2 patch and are kept; give ratios up to "
                f"{(size - base) / size:.3f}."
            )

    def num_pruned(self, step_index: int) -> int:
        """Tokens of a sample that are pruned at a step."""
        ratio = self.ratios[step_index] if isinstance(self.ratios, tuple) else self.ratios
        return int(ratio * math.prod(self.grid)) if step_index else 0

    def look(self, output: Float[Tensor, "B M P"]) -> None:
        """Keep a computed output of the first branch."""
        self.outputs = [*self.outputs[-1:], output]

    def scores(self, step_index: int) -> Float[Tensor, "B N"]:
        """What base tokens are chosen by, float64."""
        eps = torch.randn(
            (self.num_samples, self.num_tokens),
            generator=torch.Generator().manual_seed(100_003 * self.seed + step_index),
            dtype=torch.float64,
        )
        score = self.noise * eps.to(self.device)
        if len(self.outputs) == 2 and self.dynamics:
            older, newer = self.outputs
            score = score + self.dynamics * (newer.double() - older.double()).abs().mean(-1)
        return score

    def base(self, step_index: int) -> Int[Tensor, "B b"]:
        """The best token of every 2 x 2 patch, rising; patches at an odd edge are smaller."""
        frames, height, width = self.grid
        score = self.scores(step_index).unflatten(1, self.grid)
        odd = (0, width % 2, 0, height % 2)
        padded = torch.nn.functional.pad(score, odd, value=-math.inf)
        patches = padded.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).transpose(3, 4)
        best = patches.flatten(-2).argmax(-1)  # (B, frames, rows, columns)
        rows = torch.arange(best.shape[2], device=best.device)[:, None] * 2 + best // 2
        columns = torch.arange(best.shape[3], device=best.device) * 2 + best % 2
        frame = torch.arange(frames, device=best.device)[:, None, None]
        return ((frame * height + rows) * width + columns).flatten(1).sort(1).values

    def choose(self, rows: Float[Tensor, "B N C"], step_index: int) -> Choice:
        """Who takes part in an attention.

        Args:
            rows: what enters it, of the first branch.
            step_index: of the step.
        """
        unit = torch.nn.functional.normalize(rows.float(), dim=-1)
        base, count = self.base(step_index), self.num_pruned(step_index)
        everyone = torch.arange(rows.shape[1], device=rows.device).expand(rows.shape[:2])
        others = _without(everyone, base)
        likeness, _ = _nearest(take(unit, others), take(unit, base))
        pruned = others.gather(1, likeness.topk(count, dim=1).indices).sort(1).values
        kept = _without(everyone, pruned)
        _, partner = _nearest(take(unit, pruned), take(unit, kept))
        return Choice(kept, pruned, partner)

    def recover(
        self,
        own: Float[Tensor, "M N C"] | None,
        fresh: Float[Tensor, "M k C"],
        choice: Choice,
        branches: Sequence[int],
        step_index: int,
    ) -> Float[Tensor, "M N C"]:
        """The attention output of all tokens, see the class.

        Args:
            own: forecasts of it; None where none enter (`innovation.forgets`).
            fresh: of the kept tokens.
            choice: of the rows.
            branches: of the rows, in order.
            step_index: of the step.
        """
        shape = len(fresh), choice.kept.shape[1] + choice.pruned.shape[1], fresh.shape[2]
        whole = fresh.new_empty(shape)
        near = take(fresh, choice.partner)
        parts = (near, near, near) if own is None else self.beside(own, near, choice)
        back = self.innovation(*parts, branches, step_index).to(fresh.dtype)
        for numbers, rows in ((choice.kept, fresh), (choice.pruned, back)):
            places = flat_index(numbers, shape[1])
            whole.flatten(0, 1).index_copy_(0, places, rows.flatten(0, 1))
        return whole

    def beside(
        self, own: Float[Tensor, "M N C"], near: Float[Tensor, "M p C"], choice: Choice
    ) -> tuple[Float[Tensor, "M p C"], Float[Tensor, "M p C"], Float[Tensor, "M p C"]]:
        """Of the pruned tokens: the forecast, the kept token's output and its forecast."""
        speakers = choice.kept.gather(1, choice.partner)
        return take(own, choice.pruned), near, take(own, speakers)

    def state_bytes(self) -> int:
        """Bytes of the outputs."""
        return sum(output.numel() * output.element_size() for output in self.outputs)

    def most_bytes(self, to_come: int) -> int:
        """Bytes of two outputs, once there were two anchors."""
        each = [output.numel() * output.element_size() for output in self.outputs[-1:]]
        return sum(each) * min(2, len(self.outputs) + to_come)

    def describe(self) -> dict[str, Any]:
        """The class and what a fit keeps of it."""
        ratios = list(self.ratios) if isinstance(self.ratios, tuple) else self.ratios
        names = ("dynamics", "noise", "every_block", "seed")
        own = {name: getattr(self, name) for name in names}
        return {"class": "PruningPolicy", "ratios": ratios, **own}


def _without(everyone: Int[Tensor, "B N"], some: Int[Tensor, "B n"]) -> Int[Tensor, "B rest"]:
    """The numbers that are not among some, rising."""
    left = torch.ones_like(everyone, dtype=torch.bool).scatter(1, some, False)
    return everyone[left].view(len(everyone), -1)


def _nearest(
    rows: Float[Tensor, "B r C"], others: Float[Tensor, "B o C"]
) -> tuple[Float[Tensor, "B r"], Int[Tensor, "B r"]]:
    """The largest cosine of every row to another, and which; a chunk of rows at a time."""
    size = max(1, CHUNK // max(1, len(others) * others.shape[1]))
    found = [(part @ others.mT).max(-1) for part in rows.split(size, 1)]
    return torch.cat([f.values for f in found], 1), torch.cat([f.indices for f in found], 1)
