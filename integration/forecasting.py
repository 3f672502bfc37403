"""The public way to use a predictor: `with forecasting(pipe, predictor): pipe(...)`."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.spec import (
    PredictorMismatch,
    PredictorSpec,
    check_host,
    check_run,
    choose_anchors,
)
from ..predictors.base import History, Predictor, Step
from .host import host_fingerprint, transformer_of
from .report import Report
from .schedule import check_anchors
from .session import Controller, Session


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
        if self.spec is not None:
            self.spec.check_dtype(str(feature.dtype).removeprefix("torch."))
        self.num_branches = max(self.num_branches, 1 + max(step.branches))
        if not torch.isfinite(feature.sum()):
            raise ValueError(
                f"the network's {self.tap} at step {step.index} holds NaN or Inf; forecasting "
                "from it would spread it over the run. Check the model's dtype and inputs."
            )
        history = self.histories.setdefault(key, History(self.predictor.window))
        if len(history) and history.features[-1].shape != feature.shape:
            raise ValueError(
                f"the {self.tap} changed shape from {tuple(history.features[-1].shape)} to "
                f"{tuple(feature.shape)} at step {step.index}; a run must keep one shape."
            )
        history.push(step, feature)

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


class Run:
    """A predictor attached to a pipeline; `report()` tells what the latest call did."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def report(self) -> Report:
        """Which steps ran and which were forecast, state bytes, time per kind of step."""
        return self.session.report

    def detach(self) -> None:
        """Give the pipeline its own behaviour back."""
        self.session.detach()


def attach(
    pipe: Any,
    predictor: Predictor,
    anchors: Sequence[int] | None = None,
    tap: str | None = None,
) -> Run:
    """Make a pipeline forecast with `predictor` until `detach`.

    Args:
        pipe: a diffusers pipeline with a `transformer` and a `scheduler`.
        predictor: a forecaster, loaded with `load_predictor` or built.
        anchors: steps at which the network runs; None takes the predictor's own.
        tap: `output`, `hidden` or `residual`; None takes the predictor's own, else `output`.

    Returns:
        The run, for its report and for detaching.

    Raises:
        PredictorMismatch: a learned predictor was fitted on another model.
        ValueError: no anchors are known, or the host has a cache enabled.
    """
    spec: PredictorSpec | None = getattr(predictor, "spec", None)
    transformer = transformer_of(pipe)
    if spec is not None:
        check_host(spec, host_fingerprint(transformer), pipe.scheduler)
        if tap is not None and tap != spec.tap:
            raise PredictorMismatch(
                f"the predictor was fitted on the tap {spec.tap!r}, not {tap!r}; leave `tap` out."
            )
        anchors, tap = choose_anchors(spec, predictor, anchors), spec.tap
    if predictor.learned and spec is None:
        raise ValueError(
            "a learned predictor without its spec cannot be checked against this host; load it "
            "with load_predictor, or set predictor.spec."
        )
    if anchors is None:
        raise ValueError("this predictor has no anchors of its own; pass anchors=[0, ...].")
    tap = tap or "output"
    if tap not in ("output", "hidden", "residual"):
        raise ValueError(f"tap is {tap!r}, expected 'output', 'hidden' or 'residual'.")
    controller = Forecaster(predictor, tap, tuple(anchors), spec, pipe)
    return Run(Session(transformer, pipe.scheduler, controller))


@contextlib.contextmanager
def forecasting(
    pipe: Any,
    predictor: Predictor,
    anchors: Sequence[int] | None = None,
    tap: str | None = None,
) -> Iterator[Run]:
    """`attach` for the length of a `with` block; the pipeline is its old self afterwards."""
    run = attach(pipe, predictor, anchors, tap)
    try:
        yield run
    finally:
        run.detach()
