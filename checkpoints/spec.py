"""What a learned predictor was fitted on, and the checks that keep it off anything else.

A name is that of an argument, with the place of an entry in brackets: `true_cfg_scale`,
`attention_kwargs[scale]`, `control_guidance_start[0]`. None stands for nothing given.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from foreseer.errors import CheckpointError
from foreseer.errors import PredictorMismatch as PredictorMismatch
from foreseer.predictors.base import Predictor
from foreseer.predictors.ladder import rises

Value = float | None
Setting = float | tuple[float | None, ...] | None
"""A number, None, or one of them for each step of a run that changes it on its way."""

TOLERANCE = 1e-6
LORA = "lora_scale"
"""Strengths of LoRAs. Weights are compared by their digest; this tells of changes in mid-run."""


def as_settings(values: Mapping[str, Any]) -> dict[str, Setting]:
    """Settings as a file or a run gives them, in one form."""
    return {
        name: tuple(map(_number, value)) if isinstance(value, list | tuple) else _number(value)
        for name, value in values.items()
    }


def _number(value: Any) -> Value:
    return None if value is None else float(value)


def argument_of(name: str) -> str:
    """The argument that a setting is an entry of."""
    return name.partition("[")[0]


def first_difference(
    one: Mapping[str, Setting], other: Mapping[str, Setting], index: int | None = None
) -> str | None:
    """Name of the first setting that differs; None where they agree.

    An argument that either side does not tell of is not compared: files before version 3 tell of
    a few only, and other pipelines around the same network take other arguments.

    Args:
        one: settings.
        other: settings.
        index: the step to compare; None for all.
    """
    told = set(map(argument_of, one)) & set(map(argument_of, other))
    for name in sorted(one.keys() | other.keys()):
        pair = one.get(name), other.get(name)
        if argument_of(name) in told and not _equal(*pair, index):
            return name
    return None


def of_weights(values: Mapping[str, Setting]) -> dict[str, Setting]:
    """The settings that are part of the weights: strengths of LoRAs."""
    return {name: value for name, value in values.items() if argument_of(name) == LORA}


def with_weights_of(
    values: Mapping[str, Setting], other: Mapping[str, Setting]
) -> dict[str, Setting]:
    """Settings whose strengths of LoRAs are another's, where they tell of any."""
    own = of_weights(values)
    rest = {name: value for name, value in values.items() if name not in own}
    return rest | (of_weights(other) if own else {})


def at_step(setting: Setting, index: int) -> Value:
    """A setting at a step; None beyond the steps that it was recorded at."""
    if not isinstance(setting, tuple):
        return setting
    return setting[index] if index < len(setting) else None


def readable_setting(value: Value) -> str:
    """A value for a person."""
    return "none" if value is None else f"{value:g}"


def _equal(one: Setting, other: Setting, index: int | None) -> bool:
    sizes = [len(each) for each in (one, other) if isinstance(each, tuple)]
    if index is None and len(set(sizes)) > 1:
        return False
    steps = range(max([1, *sizes])) if index is None else [index]
    return all(_same(at_step(one, step), at_step(other, step)) for step in steps)


def _same(one: Value, other: Value) -> bool:
    if one is None or other is None:
        return one is other
    return abs(one - other) <= TOLERANCE * max(1.0, abs(one))


VALUES = "values_digest"
"""Entry of a host: digest of its weights in any layout, which files before version 6 lack."""

TAPS = ("output", "hidden", "residual", "before_last")
DEEP_TAP = re.compile(r"deep\.([1-9]\d*)")
"""What can be forecast: these, and what lies between the first d and the last d blocks."""


def is_tap(name: object) -> bool:
    """Whether it names something that can be forecast."""
    return isinstance(name, str) and (name in TAPS or DEEP_TAP.fullmatch(name) is not None)


SIGMA_TOLERANCE = 1e-5  # float32 grids of one recipe agree to about 1e-7


@dataclass(frozen=True)
class PredictorSpec:
    """The circumstances of a fit.

    Args:
        tap: `output`, `hidden`, `residual`, `before_last` or `deep.<d>`.
        anchors: steps at which the network runs; where the predictor serves `any_anchors`, the
            list it takes when none is given.
        sigmas: flow time of every step of the run, rising in an inversion; where the predictor
            serves `any_grid`, of the first one it was fitted on.
        host: `host_fingerprint` of the transformer.
        scheduler: class name of the scheduler.
        num_branches: guidance branches per step.
        guidance_scale: guidance of the recording.
        dtype: dtype of the tap, such as `float32`.
        recording_digest: digest of the recording fitted on.
        num_trajectories: trajectories fitted on.
        metrics: measured held-out errors, next to those of the analytic rules.
        guidance: what the pipeline call set that changes the function, by argument (see
            checkpoints/spec.py), with a value per step where it changed in mid-run. Files
            before version 3 tell of a few arguments only; others are not compared.
        latent_shapes: shapes of one sample's latents, without batch, that were fitted on: the
            resolutions and lengths the predictor serves. None of any stands for all.
        branch_steps: steps each branch lasts, where guidance stops in mid-run; empty where every
            branch lasts.
        expert_steps: first step of each transformer of the pipeline, starting with 0.
        first_branch: kind of the first of two guidance branches, `conditional` or `unconditional`;
            empty where it is not known.
    """

    tap: str
    anchors: tuple[int, ...]
    sigmas: tuple[float, ...]
    host: dict[str, Any]
    scheduler: str
    num_branches: int
    guidance_scale: float
    dtype: str
    recording_digest: str = ""
    num_trajectories: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    guidance: dict[str, Setting] = field(default_factory=dict)
    latent_shapes: tuple[tuple[int, ...], ...] = ()
    branch_steps: tuple[int, ...] = ()
    expert_steps: tuple[int, ...] = (0,)
    first_branch: str = ""

    def __str__(self) -> str:
        """One line for a person."""
        told = f"{len(self.anchors)} of {len(self.sigmas)} steps evaluated, tap {self.tap}"
        host = self.host.get("class", "an unnamed host")
        return (
            f"{told}, guidance_scale {self.guidance_scale:g}, {self.dtype}, on {host}, fitted on "
            f"{self.num_trajectories} trajectories"
        )

    def check_latents(self, shape: Sequence[int]) -> None:
        """Raise unless one sample's latents have a shape that was fitted on.

        Args:
            shape: found, without batch.

        Raises:
            PredictorMismatch: another resolution or length.
        """
        if self.latent_shapes and tuple(shape) not in self.latent_shapes:
            raise PredictorMismatch(
                f"the predictor was fitted on latents of {_shapes(self.latent_shapes)}, this run "
                f"has {'x'.join(map(str, shape))}: another resolution or length. Record and fit at "
                "this size, or fit one predictor on recordings of several sizes."
            )

    def check_branches(self, index: int, found: set[int]) -> None:
        """Raise unless a step has the branches it had in the fit.

        Args:
            index: the step.
            found: its branches.

        Raises:
            PredictorMismatch: a branch is missing or new.
        """
        expected = set(range(self.num_branches))
        if self.branch_steps:
            expected = {b for b, steps in enumerate(self.branch_steps) if index < steps}
        if found != expected:
            raise PredictorMismatch(
                f"the predictor was fitted with {len(expected)} guidance branch(es) at step "
                f"{index}, this run has {len(found)}; record and fit with this guidance."
            )

    def check_expert(self, index: int, expert: int) -> None:
        """Raise unless a step is evaluated by the transformer that evaluated it in the fit.

        Args:
            index: the step.
            expert: number of the transformer, in the order in which they run.

        Raises:
            PredictorMismatch: another one.
        """
        expected = sum(first <= index for first in self.expert_steps) - 1
        if expert != expected:
            raise PredictorMismatch(
                f"step {index} is evaluated by transformer {expert + 1}, in the fit by transformer "
                f"{expected + 1}: the pipeline changes over at another step (boundary_ratio?); "
                "record and fit with this boundary."
            )

    def check_dtype(self, dtype: str) -> None:
        """Raise unless the tap has the dtype of the fit.

        Raises:
            PredictorMismatch: it has another.
        """
        if dtype != self.dtype:
            raise PredictorMismatch(
                f"the predictor was fitted on {self.dtype} features, this run makes {dtype}; load "
                f"the pipeline in {self.dtype} or record and fit in {dtype}."
            )

    def check_guidance(self, num_branches: int, guidance_scale: float | None) -> None:
        """Raise unless a run has the guidance of the fit.

        Args:
            num_branches: guidance branches found per step.
            guidance_scale: the pipeline's scale, None where it does not tell.

        Raises:
            PredictorMismatch: another number of branches, or another scale.
        """
        if num_branches != self.num_branches:
            raise PredictorMismatch(
                f"the predictor was fitted with {self.num_branches} guidance branch(es) per step, "
                f"this run has {num_branches}; record and fit with this guidance mode."
            )
        if guidance_scale is not None and abs(guidance_scale - self.guidance_scale) > 1e-6:
            raise PredictorMismatch(
                f"the predictor was fitted at guidance_scale {self.guidance_scale:g}, this run has "
                f"{guidance_scale:g}; record and fit at {guidance_scale:g}."
            )

    def check_settings(self, index: int, found: Mapping[str, float | None]) -> None:
        """Raise unless a pipeline call sets at a step what it set in the fit.

        Args:
            index: the step.
            found: its settings.

        Raises:
            PredictorMismatch: one differs.
        """
        name = first_difference(self.guidance, found, index)
        if name is not None:
            expected = readable_setting(at_step(self.guidance.get(name), index))
            value = readable_setting(found.get(name))
            raise PredictorMismatch(
                f"the predictor was fitted at {name} {expected}, this run has {value} at step "
                f"{index}; record and fit at {value}."
            )


def _shapes(shapes: Sequence[Sequence[int]]) -> str:
    return " or ".join("x".join(map(str, shape)) for shape in shapes)


FITTED = "the predictor was fitted"


def check_host(spec: PredictorSpec, found: dict[str, Any], scheduler: Any) -> None:
    """Raise unless a host and scheduler are those of the fit.

    Args:
        spec: what the predictor was fitted on.
        found: `host_fingerprint` of the host, or what of it can be told where it is built by
            another library; what it does not tell is not compared.
        scheduler: the scheduler; None in a loop without one, known by its sigmas alone.

    Raises:
        PredictorMismatch: another class, size, configuration, weights, or scheduler class.
    """
    check_model(spec.host, found, FITTED)
    if scheduler is not None:
        check_scheduler(spec.scheduler, type(scheduler).__name__)


def check_model(expected: dict[str, Any], found: dict[str, Any], made: str) -> None:
    """Raise unless two fingerprints are of one host, in a sentence that begins with `made`."""
    names = {
        "class": "transformer class",
        "parameters": "number of parameters",
        "config_sha256": "transformer configuration",
        "weights_sha256": "weights (fine-tuned, or with a LoRA?)",
        VALUES: "weights (fine-tuned, or with a LoRA?)",
    }
    for key, name in names.items():
        told = key in found and (key in expected or key != VALUES)
        if told and expected.get(key) != found[key]:
            raise PredictorMismatch(
                f"{made} on another host: {name} is {found[key]}, expected {expected.get(key)}. "
                "Record and fit for this model: foreseer record --help"
            )


def check_scheduler(expected: str, found: str, made: str = FITTED) -> None:
    """Raise unless steps are made as in the fit or recording.

    Args:
        expected: class name of its scheduler.
        found: class name of the scheduler, or of what makes the steps instead.
        made: begins the sentence.

    Raises:
        PredictorMismatch: something else makes them.
    """
    if found != expected:
        raise PredictorMismatch(
            f"{made} under {expected}, found {found}; use that scheduler or record and fit under "
            "this one."
        )


def check_grid(spec: PredictorSpec, sigmas: list[float]) -> None:
    """Raise unless a run's sigmas are those of the fit.

    Raises:
        PredictorMismatch: another number of steps, or other sigmas.
    """
    if len(sigmas) != len(spec.sigmas):
        raise PredictorMismatch(
            f"the predictor was fitted on {len(spec.sigmas)} steps, this run has {len(sigmas)}; "
            f"set num_inference_steps={len(spec.sigmas)} or fit one for {len(sigmas)} steps."
        )
    if rises(sigmas) != rises(spec.sigmas):
        ways = {True: "rises, from a sample to noise", False: "falls, from noise to a sample"}
        raise PredictorMismatch(
            f"the predictor was fitted on runs whose flow time {ways[rises(spec.sigmas)]}; in this "
            f"run of {len(sigmas)} steps it {ways[rises(sigmas)]}. Inversion and editing are two "
            "phases: attach to each the predictor that was fitted on it."
        )
    gap, index = max(
        (abs(a - b), i) for i, (a, b) in enumerate(zip(sigmas, spec.sigmas, strict=True))
    )
    if gap > SIGMA_TOLERANCE:
        raise PredictorMismatch(off_grid(index, sigmas[index], spec.sigmas[index]))


def off_grid(index: int, found: float, expected: float) -> str:
    """What to tell whoever evaluates a step at another sigma than the fit's."""
    return (
        f"the sigma grid differs from the fit's: step {index} has sigma {found:.6f}, expected "
        f"{expected:.6f} (another shift or schedule?); record and fit on this grid."
    )


def check_run(spec: PredictorSpec, predictor: Predictor, sigmas: list[float]) -> None:
    """Raise unless a run's sigmas are those of the fit, or the predictor serves them too.

    Raises:
        PredictorMismatch: a grid it does not serve.
    """
    if not predictor.any_grid:
        check_grid(spec, sigmas)
        return
    try:
        predictor.check_grid(sigmas)
    except ValueError as error:
        raise PredictorMismatch(str(error)) from error


def choose_anchors(
    spec: PredictorSpec, predictor: Predictor, anchors: Sequence[int] | None
) -> tuple[int, ...]:
    """The anchors to run with: those given, where the predictor serves them, else the fit's.

    Args:
        spec: what the predictor was fitted on.
        predictor: the predictor.
        anchors: as given by the caller; None asks for the fit's own.

    Raises:
        PredictorMismatch: the predictor was fitted for other anchors.
    """
    if anchors is None:
        return spec.anchors
    if tuple(anchors) != spec.anchors and not predictor.any_anchors:
        raise PredictorMismatch(
            f"the predictor was fitted for the anchors {list(spec.anchors)}, found "
            f"{list(anchors)}; fit one for these anchors or leave `anchors` out."
        )
    return tuple(anchors)


def check_evaluations(predictor: Predictor, evaluations: int | None) -> None:
    """Raise unless a predictor is for a number of evaluations, where one is named.

    Raises:
        CheckpointError: it is for another.
    """
    anchors = None if predictor.spec is None else predictor.spec.anchors
    if evaluations is not None and (anchors is None or len(anchors) != evaluations):
        own = "no number" if anchors is None else str(len(anchors))
        raise CheckpointError(
            f"the predictor is for {own} of evaluations, asked for {evaluations}; leave "
            "evaluations out, or name a predictor for several."
        )
