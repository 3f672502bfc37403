"""What a forecaster is given: the step to forecast, and the features at the anchors before it.

Shapes: B batch, M tokens of the picture, P elements of a token. Features keep whatever shape the
tap has, batch first.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor

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
