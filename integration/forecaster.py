"""Forecasting on a fixed list of anchors: what a session asks for decisions by default."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.spec import PredictorSpec, check_run
from ..predictors.base import History, Predictor, Step
from .controller import Controller
from .schedule import check_anchors


class Forecaster(Controller):
    """Run the network at the anchors and the predictor at the other steps.

    Args:
        predictor: the forecaster.
        tap: `output`, `hidden` or `residual`.
        anchors: steps at which the network runs.
        spec: what a learned predictor was fitted on; its grid, guidance and dtype are checked.
        pipe: asked for its `guidance_scale`, where it has one.
    """

    def __init__(
        self,
        predictor: Predictor,
        tap: str,
        anchors: Sequence[int],
        spec: PredictorSpec | None = None,
        pipe: Any = None,
    ) -> None:
        self.predictor = predictor
        self.tap = tap
        self.taps = frozenset({tap})
        self.needs = predictor.needs - {"x_t"}
        self.anchors = tuple(anchors)
        self.spec = spec
        self.pipe = pipe
        self.num_branches = 0
        self.guidance_checked = False
        self.histories: dict[str, History] = {}

    def open(self, sigmas: list[float]) -> None:
        """Forget the last run and check the new one's grid."""
        self.histories = {}
        self.num_branches = 0
        self.guidance_checked = False
        if self.spec is not None:
            check_run(self.spec, self.predictor, sigmas)
        check_anchors(self.anchors, len(sigmas))

    def is_anchor(self, step: Step) -> bool:
        """Whether the step is in the list."""
        return step.index in self.anchors

    def observe(self, key: str, call: int, step: Step, taps: dict[str, Tensor]) -> None:
        """Add the anchor's feature to its branch's history.

        Raises:
            PredictorMismatch: a learned predictor meets another guidance mode or dtype.
            ValueError: the feature is not finite.
        """
        feature = taps[self.tap]
        self.check_feature(feature, step)
        history = self.histories.setdefault(key, History(self.predictor.window))
        check_shape(history, feature, self.tap, step)
        history.push(step, feature)

    def check_feature(self, feature: Tensor, step: Step) -> None:
        """Raise unless an anchor's feature is finite and what the predictor was fitted on.

        Raises:
            PredictorMismatch: a learned predictor meets another dtype.
            ValueError: the feature is not finite.
        """
        if self.spec is not None:
            self.spec.check_dtype(str(feature.dtype).removeprefix("torch."))
        self.num_branches = max(self.num_branches, 1 + max(step.branches))
        if not torch.isfinite(feature.sum()):
            raise ValueError(
                f"the network's {self.tap} at step {step.index} holds NaN or Inf; forecasting "
                "from it would spread it over the run. Check the model's dtype and inputs."
            )

    def forecast(self, key: str, step: Step) -> tuple[str, Tensor]:
        """The predictor's forecast for one call.

        Raises:
            ValueError: this call had no anchor before it.
        """
        history = self.histories.get(key)
        if history is None:
            raise ValueError(
                f"call {key} of step {step.index} has no anchor before it: the number of network "
                "calls per step grew within the run."
            )
        return self.tap, self.predictor(history, step)

    def close(self, step_index: int, v: Tensor, before: Tensor, after: Tensor) -> None:
        """Check the guidance once the first step has shown all its branches."""
        if self.spec is not None and not self.guidance_checked:
            self.guidance_checked = True
            scale = getattr(self.pipe, "guidance_scale", None)
            self.spec.check_guidance(self.num_branches, scale)

    def state_bytes(self) -> int:
        """Bytes of all histories."""
        return sum(history.state_bytes() for history in self.histories.values())


def check_shape(history: History, feature: Tensor, tap: str, step: Step) -> None:
    """Raise unless an anchor's feature has the shape of the one before it.

    Raises:
        ValueError: it has another.
    """
    if len(history) and history.features[-1].shape != feature.shape:
        raise ValueError(
            f"the {tap} changed shape from {tuple(history.features[-1].shape)} to "
            f"{tuple(feature.shape)} at step {step.index}; a run must keep one shape."
        )
