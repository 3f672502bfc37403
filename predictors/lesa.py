"""LESA: a gate over time times a filter over the last features, one expert per noise stage.

Shapes: K taps or history length, R = 1 + K a constant and weights, S sampling steps, B batch.
Source: LESA, arXiv 2602.20497: h_hat = h_-1 + alpha_k(t) (w_k . [h_-K ... h_-1] + b_k) with
alpha_k = KAN_k(t - t_0, ..., t - t_S). The start at reuse, the padding and the folding onto anchors
are ours.
"""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foreseer.predictors.base import History, Predictor, Step, walked_rows
from foreseer.predictors.gates import (
    GATES,
    build_gate,
    check_stages,
    same_values,
    time_differences,
    values_of,
)
from foreseer.predictors.weighted import combine

MAX_FOLDED = 1000  # lists of anchors whose rows are kept; an adaptive schedule meets ever new ones


class LesaPredictor(Predictor):
    """F_hat = h_-1 + alpha_k(sigma) (w_k . [h_-K ... h_-1] + b_k), the expert k picked by sigma.

    With `feedback` the K features are those of the K steps before, forecasts among them, as
    published: forecasts are combinations of anchors, so the recursion is folded onto the anchors
    in the history and nothing else is kept. Without it they are the newest K anchors. Where there
    are fewer than K, the oldest stands for the missing ones. Starts (w = 0, b = 0) as plain reuse.

    Args:
        sigmas: flow time of every step of the run.
        num_branches: guidance branches; each has its own experts.
        boundaries: falling flow times between the stages, empty for one stage; stage 0 lies above
            the first, and a boundary belongs to the stage below it.
        taps: K of every stage, one more than boundaries.
        gate: `kan`; `mlp` for a perceptron with as many weights; `table` for a free number per
            step, which every trained gate reduces to.
        hidden: widths of the hidden layers of the KAN; a perceptron's are scaled up.
        grid_size: intervals of the gate's spline grid.
        grid_range: the gate's spline grid covers -grid_range to grid_range.
        feedback: whether forecasts enter the history.
        bias: whether there is a b_k.

    Raises:
        ValueError: an argument is out of range.
    """

    learned = True
    tag = "lesa"

    def __init__(
        self,
        sigmas: Sequence[float],
        num_branches: int = 1,
        boundaries: Sequence[float] = (0.9, 0.5),
        taps: Sequence[int] = (4, 8, 8),
        gate: str = "kan",
        hidden: Sequence[int] = (256, 256),
        grid_size: int = 5,
        grid_range: float = 3.0,
        feedback: bool = True,
        bias: bool = True,
    ) -> None:
        super().__init__()
        check_stages(boundaries, taps)
        if not sigmas or num_branches < 1 or gate not in GATES:
            raise ValueError(
                f"found {len(sigmas)} sigmas, {num_branches} branches and the gate {gate!r}; "
                f"expected at least one of each and a gate of {GATES}."
            )
        self.sigmas = tuple(float(sigma) for sigma in sigmas)
        self.num_branches = num_branches
        self.boundaries = tuple(float(sigma) for sigma in boundaries)
        self.taps = tuple(taps)
        self.gate = gate
        self.hidden = tuple(hidden)
        self.grid_size = grid_size
        self.grid_range = grid_range
        self.feedback = feedback
        self.bias = bias
        self.window = None if feedback else max(taps)
        self.stages = [self.stage(sigma) for sigma in self.sigmas]
        self.weight: Float[Tensor, "branches stages K"]  # newest last; stages of less leave some 0
        self.weight = nn.Parameter(torch.zeros(num_branches, len(taps), max(taps)))
        self.offset: Float[Tensor, "branches stages"] | None
        self.offset = nn.Parameter(torch.zeros(num_branches, len(taps))) if bias else None
        if gate == "table":
            self.table = nn.Parameter(torch.ones(num_branches, len(self.sigmas)))
        else:
            self.gates = self._build_gates()
        self.folded: dict[tuple[int, ...], dict[int, Tensor]] = {}
        self.folded_of: list[Tensor] = []  # the values that they were made of
        self.shared: dict[tuple[int, ...], dict[int, Tensor]] | None = None

    def _build_gates(self) -> nn.ModuleList:
        """A gate per branch and stage, drawn without touching the run's random numbers."""
        settings = (len(self.sigmas) + 1, self.hidden, self.grid_size, self.grid_range)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            return nn.ModuleList(
                nn.ModuleList(build_gate(self.gate, *settings) for _ in self.taps)
                for _ in range(self.num_branches)
            )

    def stage(self, sigma: float) -> int:
        """Number of the expert in charge at a flow time."""
        return sum(sigma <= boundary for boundary in self.boundaries)

    def alpha(self, steps: Sequence[int] | None = None) -> Float[Tensor, "branches S"]:
        """The gate at some steps, all of them when None; differentiable in the parameters."""
        steps = range(len(self.sigmas)) if steps is None else steps
        if self.gate == "table":
            return self.table[:, list(steps)]
        rows = time_differences(self.sigmas)[list(steps)].to(self.weight)
        stages = torch.tensor([self.stages[step] for step in steps], device=rows.device)
        values = []
        for experts in cast(list[nn.ModuleList], list(self.gates)):
            row = rows.new_zeros(len(rows))
            for number, expert in enumerate(experts):
                inside = (stages == number).nonzero().flatten()
                if len(inside):
                    row = row.index_put((inside,), expert(rows[inside])[:, 0])
            values.append(row)
        return torch.stack(values)

    def correct(
        self, queue: Sequence[Float[Tensor, " B *shape"]], step: Step
    ) -> Float[Tensor, " B *shape"]:
        """The forecast from an explicit queue of features, differentiable in the parameters.

        What training calls: the queue holds recorded, computed or detached forecast features.

        Args:
            queue: features of the steps before (with `feedback`) or of the anchors so far, oldest
                first; only the newest K count, the oldest is repeated where there are fewer.
            step: the step to forecast.

        Raises:
            ValueError: the queue is empty, or a branch or run of steps without experts.
        """
        self.check(step)
        queue = list(queue)[-max(self.taps) :]
        if not queue:
            raise ValueError("the queue is empty: a forecast needs at least one feature.")
        row = self._row(_units(len(queue), self.weight), step.index, self.alpha([step.index])[:, 0])
        return _mix(row[list(step.branches)], queue)

    def affine(
        self, history: History, step: Step
    ) -> tuple[Float[Tensor, "K branches"], Float[Tensor, " branches"]]:
        """Weights of the features in `history`, oldest first, and the constant added, per branch.

        Raises:
            ValueError: a branch or run of steps without experts, a step that is not after the
                history, or a history without step 0 although forecasts are fed back.
        """
        row = self._row_at(history, step)
        return row[:, 1:].mT, row[:, 0]

    def rows(
        self, anchors: Sequence[int], sigmas: Sequence[float], expert_steps: Sequence[int] = (0,)
    ) -> Float[Tensor, "branches P S S"] | None:
        """The weights with the recursion folded onto the anchors, see the base class."""
        return walked_rows(self, lambda *at: self.affine(*at)[0], anchors, sigmas, expert_steps)

    def forward(self, history: History, step: Step) -> Float[Tensor, " B *shape"]:
        """The forecast, see the base class.

        Raises:
            ValueError: the history is empty, or see `affine`.
        """
        return _mix(self._row_at(history, step), history.features)

    def train(self, mode: bool = True) -> "LesaPredictor":
        """Switch the mode and forget the rows kept, see `torch.nn.Module.train`."""
        self.folded.clear()
        return super().train(mode)

    @contextlib.contextmanager
    def shared_rows(self) -> Iterator[None]:
        """Inside, differentiable rows are kept per list of anchors; parameters must not change."""
        self.shared = {}
        try:
            yield
        finally:
            self.shared = None

    def tabulated(self) -> "LesaPredictor":
        """A copy with the gate's values in a table instead of nets; it forecasts the same."""
        other = copy.deepcopy(self)
        if self.gate != "table":
            del other.gates
            other.gate = "table"
            other.table = nn.Parameter(self.alpha().detach().clone())
        return other

    def check(self, step: Step) -> None:
        """Raise unless there are experts for a step.

        Raises:
            ValueError: a branch or run of steps without experts.
        """
        if max(step.branches) >= self.num_branches or step.num_steps != len(self.sigmas):
            raise ValueError(
                f"found branch {max(step.branches)} in a run of {step.num_steps} steps, but the "
                f"experts are for {self.num_branches} branch(es) and {len(self.sigmas)} steps."
            )

    def _row_at(self, history: History, step: Step) -> Float[Tensor, "branches R"]:
        """Constant and weights of each branch, differentiable where gradients are on."""
        self.check(step)
        steps = tuple(history.steps)
        if not steps or step.index <= steps[-1] or (self.feedback and steps[0] != 0):
            raise ValueError(
                f"the history holds the steps {list(steps)}, expected earlier ones than "
                f"{step.index}" + (" from step 0 on." if self.feedback else ".")
            )
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()):
            row = self._graph_rows(steps, step.index)[step.index]
        else:
            row = self._kept_rows(steps)[step.index]
        return row[list(step.branches)]

    def _graph_rows(self, steps: tuple[int, ...], index: int) -> dict[int, Tensor]:
        """Differentiable rows up to a step, or of all steps where they are shared."""
        if self.shared is None:
            return self._rows(steps, index + 1)
        if steps not in self.shared:
            self.shared[steps] = self._rows(steps, len(self.sigmas))
        return self.shared[steps]

    def _kept_rows(self, steps: tuple[int, ...]) -> dict[int, Float[Tensor, "branches R"]]:
        """The rows after some anchors, computed once for given parameters."""
        state = values_of(p for name, p in self.named_parameters() if name[:7] != "curves.")
        if not same_values(state, self.folded_of):
            self.folded, self.folded_of = {}, state
        if steps not in self.folded:
            if len(self.folded) >= MAX_FOLDED:
                self.folded.clear()
            with torch.no_grad():
                rows = self._rows(steps, len(self.sigmas))
            self.folded[steps] = {t: row.cpu() for t, row in rows.items()}
        return self.folded[steps]

    def _rows(self, steps: tuple[int, ...], stop: int) -> dict[int, Float[Tensor, "branches R"]]:
        """Rows of the steps before `stop` over the anchors at `steps`.

        With feedback the row of a forecast is the expert's combination of the rows before it, and
        that of an anchor its unit row: B[a] = e_a, B[t] = B[t-1] + alpha (w . B[t-K ... t-1] + b).
        """
        units = _units(len(steps), self.weight)
        alpha = self.alpha()
        if not self.feedback:
            return {t: self._row(units, t, alpha[:, t]) for t in range(steps[-1] + 1, stop)}
        place = {step: number for number, step in enumerate(steps)}
        rows: list[Tensor] = []
        for t in range(stop):
            rows.append(units[place[t]] if t in place else self._row(rows, t, alpha[:, t]))
        return dict(enumerate(rows))

    def _row(
        self, queue: list[Tensor], index: int, alpha: Float[Tensor, " branches"]
    ) -> Float[Tensor, "branches R"]:
        """What the expert of a step makes of rows, oldest first; the oldest stands in for more."""
        stage = self.stages[index]
        taps = self.taps[stage]
        filled = [queue[0]] * (taps - len(queue)) + queue[-taps:]
        weight = self.weight[:, stage, -taps:].double()
        z = torch.einsum("bk,kbi->bi", weight, torch.stack(filled))
        if self.offset is not None:
            constant = torch.zeros_like(z[0])
            constant[0] = 1.0
            z = z + self.offset[:, stage, None].double() * constant
        return queue[-1] + alpha[:, None].double() * z


def _units(count: int, weight: Tensor) -> list[Float[Tensor, "branches R"]]:
    """Unit rows of so many features, after the constant's 0."""
    eye = torch.eye(count + 1, dtype=torch.float64, device=weight.device)[1:, None]
    return list(eye.expand(-1, len(weight), -1))


def _mix(
    rows: Float[Tensor, "branches R"], features: Sequence[Tensor]
) -> Float[Tensor, " B *shape"]:
    """Constant plus weighted features, per equal part of the batch axis."""
    ones = features[-1].new_ones(()).expand_as(features[-1])
    return combine(rows.mT, [ones, *features])
