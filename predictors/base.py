"""What every forecaster is: a function of the anchors so far and the step to forecast.

Shapes: K history length, B batch, N tokens, D channels, M tokens of the picture, P elements of a
token. Features keep whatever shape the tap has, batch first; (B, N, D) stands for it.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foreseer.predictors.partition import Partition
from foreseer.predictors.weighted import combine

Grid: TypeAlias = tuple[int, int, int]
"""Frames (1 of a picture), height and width in tokens."""


@dataclass(frozen=True)
class Step:
    """One evaluation slot of the sampler.

    Args:
        index: counted upward from 0 (pure noise, of an inversion the sample) to `num_steps - 1`.
        sigma: flow time of the step: it falls from 1 to 0, and rises in an inversion.
        num_steps: steps of the whole run.
        branches: branch number of each equal part of the batch axis: `(0,)` without guidance,
            `(0, 1)` when both guidance branches share one call, `(1,)` in the second of two calls.
        expert: number of the transformer called, where the pipeline has several, in the order in
            which they run.
        x_t: the network's input at this step, only for predictors that list it in `needs`.
        tokens: what enters the first block at this step, likewise.
        modulation: the host's modulation vector at this step, likewise.
        sigmas: flow time of every step of the run; empty where nobody has said it.
        groups: group number of every row and token of the call, where the run has token groups.
    """

    index: int
    sigma: float
    num_steps: int
    branches: tuple[int, ...] = (0,)
    expert: int = 0
    x_t: Tensor | None = None
    tokens: Tensor | None = None
    modulation: Tensor | None = None
    sigmas: Sequence[float] = ()
    groups: Tensor | None = None


@dataclass(frozen=True)
class Reading:
    """What a predictor read off the hidden state of an anchor.

    Args:
        values: what it tells of the forecasts up to the next anchor: elements of every token's
            patch of the output, `(B, M, P)`; in a history they are laid out like the features.
        carried: what it adds to what later anchors read, `(B, *rest)`; None for nothing.
    """

    values: Tensor
    carried: Tensor | None = None


@dataclass
class History:
    """The features at the newest anchors, oldest first, with their steps.

    Args:
        window: features kept; None keeps all.
        reading: what the predictor read off the hidden state of the newest anchor, in the features'
            shape; None where it reads nothing.
        carried: what was read so far adds to what later anchors read; None for nothing.
    """

    window: int | None = None
    steps: list[int] = field(default_factory=list)
    sigmas: list[float] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)
    reading: Tensor | None = None
    carried: Tensor | None = None

    def push(self, step: Step, feature: Tensor, reading: Reading | None = None) -> None:
        """Add the feature computed at an anchor and forget what falls out of the window.

        Args:
            step: the anchor.
            feature: its feature.
            reading: what was read off its hidden state; it replaces that of the anchor before.

        Raises:
            ValueError: the step does not follow the newest one.
        """
        if self.steps and step.index <= self.steps[-1]:
            raise ValueError(
                f"step {step.index} was pushed after step {self.steps[-1]}; call reset() between "
                "runs."
            )
        self.steps.append(step.index)
        self.sigmas.append(step.sigma)
        self.features.append(feature)
        self.reading = None
        if reading is not None:
            self.reading, self.carried = reading.values, reading.carried
        if self.window is not None:
            keep = slice(max(0, len(self.steps) - self.window), None)
            self.steps, self.sigmas = self.steps[keep], self.sigmas[keep]
            self.features = self.features[keep]

    def reset(self) -> None:
        """Forget everything."""
        self.steps, self.sigmas, self.features = [], [], []
        self.reading = self.carried = None

    def map(self, change: Callable[[Tensor], Tensor]) -> "History":
        """A history of the same steps with every tensor changed.

        Args:
            change: from a tensor to what takes its place.
        """
        features = [change(feature) for feature in self.features]
        read = [t if t is None else change(t) for t in (self.reading, self.carried)]
        return History(self.window, list(self.steps), list(self.sigmas), features, *read)

    def resample(
        self,
        lift: Callable[[Tensor], Tensor],
        time: Callable[[float], float],
        length: int,
        window: int | None = None,
    ) -> "History":
        """The history that a run on another grid begins with, where it goes on from this run.

        What was read stays behind: it told of the forecasts of this run.

        Args:
            lift: takes a feature to the grid of the run to come.
            time: flow time of the run to come at one of this run.
            length: steps of this run, from whose end its anchors are counted back: -1 is the last.
            window: features kept; None keeps all.
        """
        first = 0 if window is None else max(0, len(self) - window)
        return History(
            window,
            [step - length for step in self.steps[first:]],
            [time(sigma) for sigma in self.sigmas[first:]],
            [lift(feature) for feature in self.features[first:]],
        )

    def state_bytes(self) -> int:
        """Bytes of the features held, and of what was read."""
        held = [*self.features, *(t for t in (self.reading, self.carried) if t is not None)]
        return sum(f.numel() * f.element_size() for f in held)

    def __len__(self) -> int:
        return len(self.steps)


SMALLEST = (2, 4)
"""Tokens and channels of a feature for predictors that take any."""


class Predictor(nn.Module):
    """Forecast the feature at `step` from the anchors in `history`.

    Attributes:
        window: anchors the forecaster looks at; None means all.
        needs: names of the `Step` fields it asks for beyond the clock (`x_t`, `tokens`,
            `modulation`).
        reads: whether `read` is asked at every anchor of its own, with the hidden state of the
            picture's tokens; what it returns lies in `History.reading` until the next anchor.
        learned: whether it was fitted on a recording of one host.
        any_anchors: whether a learned predictor serves anchors other than those in its spec, which
            are then only the list it takes when none is given.
        any_grid: whether a learned predictor serves other grids than the one in its spec;
            `check_grid` says which.
        from_grams: whether summed Grams determine it: `refitted`.
        continues: anchors of the run before, whose features a run has to begin with, counted back
            from its end: -1 is its last step. None of most predictors.
        spec: what it was fitted on, a `PredictorSpec`; None of a formula, and of a learned one that
            was only built.
        tag: of its model card.
        form: what it makes of what the network computed, in the card's words.
        num_branches: guidance branches it tells apart.
        width: channels of the hidden state it is given, if it `reads` or `needs` one.
        modulation_width: of the modulation vector it is given, if it `needs` one.
        block_weights: weights of the host's last block for forecast steps, by name; only on the tap
            `before_last`, where that block runs. None for its own.
        first_time: flow time in (0, 1] that the network is told at step 0; None for the step's own.
        tokens: the token policy that was fitted with it, a new one every time; None of most.
    """

    window: int | None = None
    needs: frozenset[str] = frozenset()
    reads: bool = False
    learned: bool = False
    any_anchors: bool = False
    any_grid: bool = False
    from_grams: bool = False
    continues: tuple[int, ...] = ()
    spec: Any = None
    tag: str = "l2p"
    form: str = "weighted sums of"
    num_branches: int = 1
    width: int = 1
    modulation_width: int = 1
    first_time: float | None = None

    @property
    def tokens(self) -> Any:
        """See the attributes above."""
        return None

    @property
    def block_weights(self) -> dict[str, Tensor] | None:
        """See the attributes above."""
        return None

    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments, as what JSON holds: what a file keeps beside the state."""
        names = list(inspect.signature(type(self).__init__).parameters)[1:]
        return {name: getattr(self, name) for name in names}

    def size(self) -> str:
        """How much was fitted, in words."""
        weights = sum(int((rows != 0).sum()) for rows in self.state_dict().values())
        return f"{weights} non-zero weights"

    @property
    def smallest(self) -> tuple[int, int]:
        """Tokens and channels of a small feature that it takes."""
        return SMALLEST

    @property
    def group_names(self) -> tuple[str, ...]:
        """Names of the token groups that every call has to bring; none of most predictors."""
        return ()

    def rows(
        self, anchors: Sequence[int], sigmas: Sequence[float], expert_steps: Sequence[int] = (0,)
    ) -> Float[Tensor, "branches P S S"] | None:
        """W of F_hat_t = sum_p P_p sum_s W[branch, p, t, s] F_s, on given anchors.

        The row of an anchor is its unit row. P is 1 of the whole feature; a formula has one branch,
        which stands for all. What a predictor adds to the sum (constants, curves, what it reads) is
        left out.

        Args:
            anchors: steps at which the network runs.
            sigmas: flow time of every step.
            expert_steps: first step of each transformer, starting with 0; none knows another's
                features.

        Returns:
            The rows; None where a forecast is no weighted sum.

        Raises:
            ValueError: a learned predictor is for other anchors or another run.
        """
        return None

    def extra_repr(self) -> str:
        """What tells this one from others: its circumstances, or its class's own arguments."""
        if self.spec is not None:
            return str(self.spec)
        names = inspect.signature(type(self)).parameters
        told = {name: getattr(self, name) for name in names if hasattr(self, name)}
        plain = {n: v for n, v in told.items() if isinstance(v, int | float | str | tuple | None)}
        return ", ".join(f"{name}={value!r}" for name, value in plain.items())

    def check_grid(self, sigmas: Sequence[float]) -> None:
        """Raise if the predictor serves any grid but this one; asked only where `any_grid` holds.

        Args:
            sigmas: flow time of every step of the run.
        """

    def check_before(self, sigmas: Sequence[float]) -> None:
        """Raise if the predictor does not go on from a run of these steps.

        Args:
            sigmas: flow time of every step of the run before, on its own clock.
        """

    def read(
        self,
        hidden: Float[Tensor, "B M D"],
        step: Step,
        grid: Grid | None = None,
        carried: Tensor | None = None,
    ) -> Reading | None:
        """What the hidden state at an anchor tells of the forecasts to come; asked if `reads`.

        Args:
            hidden: what entered the head, at the tokens that enter the output.
            step: the anchor.
            grid: of these tokens; None where it is not known.
            carried: of the history so far.

        Returns:
            What was read; None for nothing.
        """
        raise NotImplementedError

    def forward(self, history: History, step: Step) -> Float[Tensor, " B *shape"]:
        """The forecast, in the dtype of the history.

        Raises:
            ValueError: the history is empty.
        """
        raise NotImplementedError


class LinearPredictor(Predictor):
    """Base of everything of the form F_hat = sum_p P_p sum_k c_pk F_k.

    A rule implements only `coefficients`. Sums run in float32; the history keeps the model's dtype.

    Attributes:
        partition: the projectors P_p where parts of a feature have weights of their own; None of
            the whole feature.
    """

    partition: Partition | None = None

    def coefficients(
        self, history: History, step: Step
    ) -> Float[Tensor, " K"] | Float[Tensor, "K branches"] | Float[Tensor, "P K branches"]:
        """Weights of the features in `history`, oldest first.

        Returns:
            One weight per feature; or one per feature and entry of `step.branches`; or, with a
            partition, per part, feature and branch, where one branch stands for all.
        """
        raise NotImplementedError

    def forward(self, history: History, step: Step) -> Float[Tensor, " B *shape"]:
        """sum_p P_p sum_k c_pk F_k, see the base class.

        Raises:
            ValueError: the history is empty, or its features cannot be split.
        """
        if not len(history):
            raise ValueError("the history is empty: a forecast needs at least one anchor.")
        weights = self.coefficients(history, step)
        if self.partition is None:
            return combine(weights, history.features)
        return self.partition.at(step.groups).combine(weights, history.features)

    @property
    def smallest(self) -> tuple[int, int]:
        """Tokens and channels, see the base class."""
        return SMALLEST if self.partition is None else self.partition.smallest

    @property
    def group_names(self) -> tuple[str, ...]:
        """See the base class."""
        return () if self.partition is None else self.partition.of_calls

    def rows(
        self, anchors: Sequence[int], sigmas: Sequence[float], expert_steps: Sequence[int] = (0,)
    ) -> Float[Tensor, "branches P S S"]:
        """The weights as rows, see the base class."""
        return walked_rows(self, self.coefficients, anchors, sigmas, expert_steps)

    def refitted(
        self, total: Float[Tensor, "branches P S S"], count: int, strength: float
    ) -> "LinearPredictor":
        """Another like this one with the closed form of summed Grams; asked if `from_grams`.

        Args:
            total: summed Grams of all its parts.
            count: of how many trajectories.
            strength: of the ridge toward reuse.
        """
        raise NotImplementedError


@torch.no_grad()
def walked_rows(
    predictor: Predictor,
    coefficients: Callable[[History, Step], Tensor],
    anchors: Sequence[int],
    sigmas: Sequence[float],
    expert_steps: Sequence[int],
) -> Float[Tensor, "branches P S S"]:
    """`Predictor.rows`, by asking for the weights of every step of a run without features."""
    size, num_steps = predictor.num_branches, len(sigmas)
    partition = getattr(predictor, "partition", None)
    parts = 1 if partition is None else partition.num_parts
    rows = torch.zeros(size, parts, num_steps, num_steps, dtype=torch.float64)
    history = History(predictor.window)
    for t, sigma in enumerate(sigmas):
        step = Step(t, sigma, num_steps, tuple(range(size)), sigmas=sigmas)
        if t in expert_steps:
            history.reset()
        if t in anchors:
            history.push(step, torch.empty(0))
            rows[..., t, t] = 1.0
            continue
        weights = coefficients(history, step).double().cpu()
        weights = weights if weights.ndim > 1 else weights[:, None]  # (K, branches)
        rows[:, :, t, history.steps] = (weights if weights.ndim == 3 else weights[None]).movedim(
            2, 0
        )
    return rows
