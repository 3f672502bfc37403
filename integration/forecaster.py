"""Forecasting on a fixed list of anchors: what a session asks for decisions by default."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from foreseer.checkpoints.spec import PredictorSpec, check_host, check_run
from foreseer.integration.controller import Controller
from foreseer.integration.host.call_rows import Narrowed
from foreseer.integration.host.denoisers import transformers_of
from foreseer.integration.host.fingerprint import host_fingerprint
from foreseer.integration.memory import most_bytes
from foreseer.integration.schedule import check_anchors
from foreseer.predictors.base import History, Predictor, Reading, Step


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
        self.taps = frozenset({tap, "hidden"} if predictor.reads else {tap})
        self.wants_layout = predictor.reads
        self.needs = predictor.needs - {"x_t"}
        self.anchors = tuple(anchors)
        self.spec = spec
        self.pipe = pipe
        self.branches: set[int] = set()  # of the step in progress
        self.guidance_checked = False
        self.guidance_scale: float | None = None  # as the run began
        self.last_step = -1  # of the run
        self.narrow = False  # whether forecasts are float16, whose largest number is 65504
        self.histories: dict[str, History] = {}

    def open(self, sigmas: list[float]) -> None:
        """Forget the last run and check the new one's grid and the weights it runs on.

        Raises:
            PredictorMismatch: another grid, or weights that changed since attaching.
        """
        self.histories = {}
        self.branches = set()
        self.guidance_checked = False
        self.guidance_scale = self.settings.get(
            "guidance_scale", getattr(self.pipe, "guidance_scale", None)
        )
        self.last_step, self.narrow = len(sigmas) - 1, False
        if self.spec is not None:
            check_run(self.spec, self.predictor, sigmas)
            self._check_weights(self.spec)
        check_anchors(self.anchors, len(sigmas))

    def _check_weights(self, spec: PredictorSpec) -> None:
        """Look at the weights of this run: a LoRA may have been loaded since attaching."""
        if self.pipe is not None:
            found = host_fingerprint(*transformers_of(self.pipe).values())
            check_host(spec, found, self.pipe.scheduler)

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
        read = self._read(key, step, taps, history.carried) if self.predictor.reads else None
        history.push(step, feature, read)

    def _read(
        self, key: str, step: Step, taps: dict[str, Tensor], carried: Tensor | None
    ) -> Reading | None:
        """What the predictor reads off an anchor's hidden state, laid out like the output."""
        layout = self.layouts[key]
        read = self.predictor.read(layout.hidden(taps["hidden"]), step, layout.grid, carried)
        if read is None:
            return None
        return Reading(layout.place(read.values.to(taps[self.tap])), read.carried)

    def check_feature(self, feature: Tensor, step: Step) -> None:
        """Raise unless an anchor's feature is finite and what the predictor was fitted on.

        Raises:
            PredictorMismatch: a learned predictor meets another dtype.
            ValueError: the feature is not finite.
        """
        if self.spec is not None:
            self.spec.check_expert(step.index, step.expert)
            self.spec.check_dtype(str(feature.dtype).removeprefix("torch."))
        self.branches.update(step.branches)
        self.narrow = feature.dtype == torch.float16
        if not is_finite(feature):
            raise ValueError(
                f"the network's {self.tap} at step {step.index} holds NaN or Inf; forecasting "
                "from it would spread it over the run. Check the model's dtype and inputs."
            )

    def adopt(self, key: str, narrowed: Narrowed) -> None:
        """Go on with the history of the branches that are left."""
        history = self.histories.pop(narrowed.source, None)
        if history is not None:
            self.histories[key] = history.map(narrowed.take)

    def knows(self, key: str) -> bool:
        """Whether the call has an anchor: one that starts in mid-run is computed first."""
        return key in self.histories

    def forecast(self, key: str, step: Step) -> tuple[str, Tensor]:
        """The predictor's forecast for one call that it knows."""
        if self.spec is not None:
            self.spec.check_expert(step.index, step.expert)
        history = self.histories[key]
        self.branches.update(step.branches)
        return self.tap, self.predictor(history, step)

    def close(self, step_index: int, v: Tensor, before: Tensor, after: Tensor) -> None:
        """Check what the call sets, now that the step has shown its branches, and the last sample.

        Raises:
            PredictorMismatch: a learned predictor meets other branches, settings or latents.
            ValueError: a forecast left the range of float16 after the last anchor.
        """
        if self.narrow and step_index == self.last_step and not is_finite(after):
            raise ValueError(
                f"the sample of the run holds NaN or Inf, though the network's {self.tap} did not: "
                "a forecast left the range of float16, 65504. Run the model in bfloat16 or "
                "float32, or use more anchors or a lower order."
            )
        if self.spec is not None:
            if not self.guidance_checked:
                self.spec.check_guidance(len(self.branches), self.guidance_scale)
                self.guidance_checked = True
            self.spec.check_settings(step_index, self.settings)
            self.spec.check_latents(tuple(after.shape[1:]))
            self.spec.check_branches(step_index, self.branches)
        self.branches = set()

    def forget(self) -> None:
        """Let go of all features."""
        self.histories = {}

    def state_bytes(self) -> int:
        """Bytes of all histories."""
        return sum(history.state_bytes() for history in self.histories.values())

    def to_come(self, index: int, num_steps: int) -> int:
        """Anchors after a step, at most."""
        return sum(anchor > index for anchor in self.anchors)

    def most_bytes(self, index: int, num_steps: int) -> int:
        """Bytes of all histories at most; those without an anchor at this step get no more."""
        to_come = self.to_come(index, num_steps)
        return sum(
            most_bytes(history, to_come if history.steps[-1] == index else 0)
            for history in self.histories.values()
        )


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor Inf, by its sum in float32 or wider."""
    wide = torch.promote_types(tensor.dtype, torch.float32)  # float16 sums overflow at 65504
    return bool(torch.isfinite(tensor.sum(dtype=wide)))


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
