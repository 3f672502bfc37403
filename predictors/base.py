"""What every forecaster is: a function of the anchors so far and the step to forecast.

Shapes: K history length, B batch, N tokens, D channels. Features keep whatever shape the tap has,
batch first; (B, N, D) stands for it.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

Grid: TypeAlias = tuple[int, int, int]
"""Frames (1 of a picture), height and width in tokens."""


@dataclass(frozen=True)
class Step:
    """One evaluation slot of the sampler.

    Args:
        index: counted upward from 0 (pure noise) to `num_steps - 1`.
        sigma: flow time of the step, 1 to 0.
        num_steps: steps of the whole run.
        branches: branch number of each equal part of the batch axis: `(0,)` without guidance,
            `(0, 1)` when both guidance branches share one call, `(1,)` in the second of two calls.
        expert: number of the transformer called, where the pipeline has several, in the order in
            which they run.
        x_t: the network's input at this step, only for predictors that list it in `needs`.
        tokens: what enters the first block at this step, likewise.
        modulation: the host's modulation vector at this step, likewise.
    """

    index: int
    sigma: float
    num_steps: int
    branches: tuple[int, ...] = (0,)
    expert: int = 0
    x_t: Tensor | None = None
    tokens: Tensor | None = None
    modulation: Tensor | None = None


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

    def state_bytes(self) -> int:
        """Bytes of the features held, and of what was read."""
        held = [*self.features, *(t for t in (self.reading, self.carried) if t is not None)]
        return sum(f.numel() * f.element_size() for f in held)

    def __len__(self) -> int:
        return len(self.steps)


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
        spec: what it was fitted on, a `PredictorSpec`; None of a formula, and of a learned one that
            was only built.
    """

    window: int | None = None
    needs: frozenset[str] = frozenset()
    reads: bool = False
    learned: bool = False
    any_anchors: bool = False
    any_grid: bool = False
    spec: Any = None

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
    """Base of everything of the form F_hat = sum_k c_k F_k.

    A rule implements only `coefficients`. Sums run in float32; the history keeps the model's dtype.
    """

    def coefficients(
        self, history: History, step: Step
    ) -> Float[Tensor, " K"] | Float[Tensor, "K branches"]:
        """Weights of the features in `history`, oldest first.

        Returns:
            One weight per feature, or one per feature and entry of `step.branches`.
        """
        raise NotImplementedError

    def forward(self, history: History, step: Step) -> Float[Tensor, " B *shape"]:
        """sum_k c_k F_k, see the base class."""
        if not len(history):
            raise ValueError("the history is empty: a forecast needs at least one anchor.")
        return combine(self.coefficients(history, step), history.features)


def combine(
    weights: Float[Tensor, " K"] | Float[Tensor, "K branches"], features: list[Tensor]
) -> Float[Tensor, " B *shape"]:
    """sum_k w_k F_k in float32 or wider, returned in the features' dtype.

    Args:
        weights: one weight per feature, or one per feature and equal part of the batch axis.
        features: tensors of one shape, batch first.
    """
    newest = features[-1]
    dtype = torch.promote_types(newest.dtype, torch.float32)
    if weights.ndim == 2 and weights.shape[1] > 1:
        parts = [torch.chunk(feature, weights.shape[1]) for feature in features]
        rows = [combine(w, [p[i] for p in parts]) for i, w in enumerate(weights.unbind(1))]
        return torch.cat(rows)
    total: Tensor | None = None
    product: Tensor | None = None  # one buffer for all terms: fresh memory costs more than the sum
    values = weights.flatten() if weights.requires_grad else weights.flatten().tolist()
    for value, feature in zip(values, features, strict=True):
        if isinstance(value, float) and value == 0.0:
            continue
        term = feature.to(dtype)
        if total is None:
            total = term * value
        elif term.requires_grad or not isinstance(value, float):
            total = total + term * value
        else:
            product = torch.mul(term, value, out=product)
            total.add_(product)
    if total is None:
        return torch.zeros_like(newest)
    return total.to(newest.dtype)
