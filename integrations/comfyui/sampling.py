"""A predictor at work inside one sampling of ComfyUI, at the wrapper around the diffusion model.

ComfyUI tells its wrappers the sigmas of a call and, per equal part of its rows, whether it is the
conditional one and its `uuid`: histories are kept by that, since ComfyUI puts branches together or
apart by the memory that is free.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from foreseer.checkpoints.spec import PredictorMismatch, PredictorSpec, check_host, check_scheduler
from foreseer.errors import UnsupportedHost
from foreseer.integration.forecast_model import any_layout, output_forecaster
from foreseer.integration.host.call import retold
from foreseer.integration.sigma_run import (
    SigmaRun,
    check_first_time,
    flow_time,
    one_sigma,
    without_end,
)
from foreseer.predictors.base import LinearPredictor, Predictor

KEY = "foreseer"
FIRST_BRANCHES = ("as recorded", "no guidance", "conditional", "unconditional")
"""Which branch the pipeline of the fit ran first; ComfyUI numbers the conditional one 0."""

SAMPLERS = {"FlowMatchEulerDiscreteScheduler": ("sample_euler", "sample_forecast")}
"""Functions that make the steps of a diffusers scheduler."""

OTHER = ("control", "hooks", "gligen")
"""Entries of a conditioning that change the function the network computes."""


class Forecast:
    """The wrapper around the diffusion model: runs it at anchors and forecasts its output else.

    Args:
        predictor: learned, on the tap `output`, the same rows for all of the output's elements.
        first_branch: one of `FIRST_BRANCHES`.

    Raises:
        PredictorMismatch: the predictor was fitted on another tap or with another guidance mode.
        UnsupportedHost: it asks for more than ComfyUI shows of a model.
        ValueError: it is a formula, or `first_branch` is none of the three.
    """

    def __init__(self, predictor: Predictor, first_branch: str) -> None:
        if predictor.spec is None or first_branch not in FIRST_BRANCHES:
            raise ValueError(
                f"found the {'formula' if predictor.spec is None else 'predictor'} "
                f"{type(predictor).__name__} and first_branch {first_branch!r}, expected a "
                f"predictor of Load Predictor and one of {list(FIRST_BRANCHES)}."
            )
        whole = isinstance(predictor, LinearPredictor) and predictor.partition is None
        if predictor.reads or not whole:
            raise UnsupportedHost(
                f"{type(predictor).__name__} looks at more than whole outputs, and ComfyUI lays "
                "them out in its own way; use a predictor of linear rows, such as L2P, on the tap "
                "'output'."
            )
        self.predictor = predictor
        self.first_branch = order_of(predictor.spec, first_branch)
        self.run: SigmaRun | None = None

    def begin(self, guider: Any, sigmas: Tensor, sampler: Any) -> None:
        """A sampling begins: check what it runs on, and forget the last one.

        Args:
            guider: ComfyUI's, which holds the model, the conditionings and the guidance scale.
            sigmas: of the sampling, with the 0 at the end.
            sampler: ComfyUI's.

        Raises:
            PredictorMismatch: another model, sampler, grid or guidance scale than the fit's.
        """
        spec = self.predictor.spec
        check_model(spec, guider.model_patcher)
        function = getattr(sampler, "sampler_function", sampler)
        name = getattr(function, "__name__", type(function).__name__)
        alike = name in SAMPLERS.get(spec.scheduler, ())
        check_scheduler(spec.scheduler, spec.scheduler if alike else name)
        for conds in guider.conds.values():
            check_conditioning(conds)
        self.kind = kind_of(guider.model_patcher)
        check_first_time(self.predictor, self.kind)
        grid = [flow_time(sigma, self.kind) for sigma in without_end(sigmas)]
        forecaster = output_forecaster(self.predictor, None)
        scale = guidance_of(guider, spec.num_branches)
        forecaster.settings = {} if scale is None else {"guidance_scale": scale}
        self.run = SigmaRun(forecaster, grid, lambda: None)
        forecaster.open(grid)  # refuses before the first evaluation

    def end(self) -> None:
        """A sampling is over, finished or not."""
        if self.run is not None:
            self.run.reset()
            logging.info("foreseer: %s", str(self.run.report).splitlines()[0])

    def __call__(self, executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        """One call of the diffusion model.

        Args:
            executor: the model, or the next wrapper.
            args: x, time and the rest, the last or the one before it the options.
            kwargs: may hold the options instead.

        Raises:
            PredictorMismatch: the sampling leaves the fit's grid, guidance, dtype or latents.
            ValueError: the model is called outside of a sampling.
        """
        if self.run is None:
            raise ValueError("the model is called outside of a sampling, so it has no steps.")
        try:
            return self._call(self.run, options_of(args, kwargs), executor, args, kwargs)
        except BaseException:
            self.run.reset()
            raise

    def _call(
        self, run: SigmaRun, options: dict[str, Any], executor: Callable, args: tuple, kwargs: dict
    ) -> Tensor:
        started = time.perf_counter()
        swap = self.first_branch == "unconditional"
        branches = [1 - each if swap else each for each in options["cond_or_uncond"]]
        keys = [str(uuid) for uuid in options["uuids"]]
        sigma = flow_time(one_sigma(options["sigmas"]), self.kind)
        x_t = self._like_latents(args[0])
        step = run.enter(sigma, keys, branches, x_t)
        parts = [replace(step, branches=(branch,)) for branch in branches]
        ran = run.computes(keys, step)
        if ran:
            if (told := run.forecaster.told(step)) is not None:
                args = (args[0], retold(args[1], sigma, told), *args[2:])
            out = executor(*args, **kwargs)
            if not isinstance(out, Tensor):
                raise UnsupportedHost(
                    f"the diffusion model returned {type(out).__name__}, expected one tensor."
                )
            for key, part, rows in zip(keys, parts, out.chunk(len(keys)), strict=True):
                run.observe(key, part, rows)
        else:
            pairs = zip(keys, parts, strict=True)
            out = torch.cat([run.forecast(key, part) for key, part in pairs])
        run.leave(step, x_t, ran, time.perf_counter() - started)
        return out

    def _like_latents(self, x: Tensor) -> Tensor:
        """The input as latents of the fit, which are tokens where the pipeline packs them."""
        shapes = self.predictor.spec.latent_shapes
        packed = [shape for shape in shapes if math.prod(shape) == x[0].numel()]
        return x.reshape(-1, *packed[0]) if packed and tuple(x.shape[1:]) not in shapes else x


def options_of(args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The `transformer_options` of a call of a diffusion model.

    Raises:
        UnsupportedHost: the model is not told them, or they lack what steps are counted by.
    """
    found: Any = kwargs.get("transformer_options") or next(
        (value for value in reversed(args) if isinstance(value, dict) and "sigmas" in value), {}
    )
    lacking = {"sigmas", "uuids", "cond_or_uncond"} - found.keys()
    if lacking:
        raise UnsupportedHost(
            f"the diffusion model is not told {sorted(lacking)}, by which steps and branches are "
            "known; this ComfyUI is older than its wrappers, or the model does not pass them on."
        )
    return found


def order_of(spec: PredictorSpec, told: str) -> str:
    """Which branch the pipeline of the fit ran first: what a node says, or the predictor's file.

    Args:
        spec: of the predictor.
        told: one of `FIRST_BRANCHES`.

    Raises:
        PredictorMismatch: they contradict each other, or the file does not know and nothing is
            told.
    """
    known = spec.first_branch if spec.num_branches > 1 else "no guidance"
    if told not in (("as recorded", known) if known else ("conditional", "unconditional")):
        raise PredictorMismatch(
            f"the predictor was fitted with {spec.num_branches} guidance branch(es) per step, its "
            f"file says of the order {known or 'nothing'!r}, and first_branch is {told!r}; say "
            "which branch the pipeline of the fit ran first (conditional: Qwen-Image, Wan, "
            "HunyuanVideo; unconditional: Stable Diffusion 3), or 'no guidance' of one branch "
            "(FLUX.1)."
        )
    return known or told


def check_model(spec: PredictorSpec, patcher: Any) -> None:
    """Raise unless a model has the fit's weights, as far as can be told, and no patches.

    ComfyUI names and lays out weights in its own way.

    Raises:
        PredictorMismatch: another model, or one with a LoRA.
    """
    check_host(spec, any_layout(spec, patcher.model.diffusion_model), None)
    if patcher.patches:
        check_host(spec, {"weights_sha256": f"{len(patcher.patches)} patched"}, None)


def check_conditioning(conds: Sequence[dict[str, Any]] | None) -> None:
    """Raise if a conditioning changes the function that the network computes.

    Raises:
        PredictorMismatch: it has a ControlNet, hooks or GLIGEN.
    """
    for cond in conds or ():
        found = [name for name in OTHER if cond.get(name) is not None]
        if found:
            raise PredictorMismatch(
                f"the predictor was fitted at {found[0]} none, this run has one; take it off, or "
                "record and fit with it on a diffusers pipeline and sample there."
            )


def kind_of(patcher: Any) -> str:
    """What the diffusion model returns: `v` of a flow model, else `eps`."""
    sampling = type(patcher.model.model_sampling)
    return "v" if any(each.__name__ == "CONST" for each in sampling.__mro__) else "eps"


def guidance_of(guider: Any, num_branches: int) -> float | None:
    """The guidance scale of a sampling: of the two branches, or told to the network.

    Returns:
        The scale; None where the model takes none.
    """
    if num_branches > 1:
        return float(guider.cfg)
    host = guider.model_patcher.model.diffusion_model
    if not getattr(getattr(host, "params", None), "guidance_embed", False):
        return None
    told = [cond.get("guidance", 3.5) for cond in guider.conds.get("positive") or ()]
    return float(told[0]) if told else None
