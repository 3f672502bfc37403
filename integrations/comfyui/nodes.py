"""The nodes: Load Predictor, Apply foreseer, Learned Sampler."""

from typing import Any

import comfy.k_diffusion.sampling
import comfy.model_patcher
import comfy.patcher_extension
import comfy.samplers
import torch
from comfy_api.latest import ComfyExtension, io

from foreseer.checkpoints.format import load_predictor
from foreseer.predictors.base import Predictor

from .sampling import FIRST_BRANCHES, KEY, Forecast

PredictorType = io.Custom("FORESEER_PREDICTOR")
Wrappers = comfy.patcher_extension.WrappersMP
CATEGORY = "foreseer"
CACHES = (KEY, "easycache", "lazycache")
FIRST_BRANCH = io.Combo.Input(
    "first_branch",
    options=list(FIRST_BRANCHES),
    tooltip="Which guidance branch the pipeline of the fit ran first, where the predictor's file "
    "does not know. No guidance: FLUX.1. Conditional: Qwen-Image, Wan, HunyuanVideo. "
    "Unconditional: Stable Diffusion 3.",
)


class LoadPredictor(io.ComfyNode):
    """A predictor from a folder, a bundled one or the hub, and the sigmas it was fitted on."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Its inputs and outputs."""
        return io.Schema(
            node_id="ForeseerLoadPredictor",
            display_name="Load Predictor (foreseer)",
            category=CATEGORY,
            inputs=[
                io.String.Input("name", tooltip="A folder, owner/name of the hub, or zoo:<name>.")
            ],
            outputs=[PredictorType.Output(display_name="predictor"), io.Sigmas.Output()],
        )

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        """Load it; everything that is wrong with a file is said here."""
        predictor = load_predictor(name)
        return io.NodeOutput(predictor, sigmas_of(predictor))


class ApplyForeseer(io.ComfyNode):
    """A model that runs its network at the predictor's anchors only, under any Euler sampler."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Its inputs and outputs."""
        return io.Schema(
            node_id="ForeseerApply",
            display_name="Apply foreseer",
            category=CATEGORY,
            inputs=[io.Model.Input("model"), PredictorType.Input("predictor"), FIRST_BRANCH],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: Any, predictor: Predictor, first_branch: str) -> io.NodeOutput:
        """Put the wrappers on a clone of the model."""
        refuse_other_caches(model.wrappers)
        forecast, model = Forecast(predictor, first_branch), model.clone()
        model.add_wrapper_with_key(Wrappers.DIFFUSION_MODEL, KEY, forecast)
        model.add_wrapper_with_key(Wrappers.OUTER_SAMPLE, KEY, Outer(forecast))
        return io.NodeOutput(model)


class LearnedSampler(io.ComfyNode):
    """Euler on the predictor's grid that forecasts by itself: a SAMPLER and its SIGMAS."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Its inputs and outputs."""
        return io.Schema(
            node_id="ForeseerLearnedSampler",
            display_name="Learned Sampler (foreseer)",
            category=CATEGORY,
            inputs=[PredictorType.Input("predictor"), FIRST_BRANCH],
            outputs=[io.Sampler.Output(), io.Sigmas.Output()],
        )

    @classmethod
    def execute(cls, predictor: Predictor, first_branch: str) -> io.NodeOutput:
        """A sampler of the custom sampling nodes."""
        options = {"forecast": Forecast(predictor, first_branch)}
        sampler = comfy.samplers.KSAMPLER(sample_forecast, options)
        return io.NodeOutput(sampler, sigmas_of(predictor))


class Outer:
    """The wrapper around a whole sampling, which begins and ends its forecasts.

    Args:
        forecast: what is wrapped around the diffusion model.
    """

    def __init__(self, forecast: Forecast) -> None:
        self.forecast = forecast

    def __call__(
        self,
        executor: Any,
        noise: Any,
        latent: Any,
        sampler: Any,
        sigmas: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """One sampling; nothing of it is kept afterwards."""
        self.forecast.begin(executor.class_obj, sigmas, sampler)
        try:
            return executor(noise, latent, sampler, sigmas, *args, **kwargs)
        finally:
            self.forecast.end()


def sample_forecast(
    model: Any,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    extra_args: dict[str, Any],
    callback: Any = None,
    disable: Any = None,
    *,
    forecast: Forecast,
) -> torch.Tensor:
    """ComfyUI's Euler with the wrapper around the diffusion model for its length."""
    guider = model.inner_model
    options = comfy.model_patcher.create_model_options_clone(extra_args["model_options"])
    refuse_other_caches(options["transformer_options"].get("wrappers", {}))
    comfy.patcher_extension.add_wrapper_with_key(
        Wrappers.DIFFUSION_MODEL, KEY, forecast, options, is_model_options=True
    )
    forecast.begin(guider, sigmas, sample_forecast)
    try:
        return comfy.k_diffusion.sampling.sample_euler(
            model, x, sigmas, {**extra_args, "model_options": options}, callback, disable
        )
    finally:
        forecast.end()


def sigmas_of(predictor: Predictor) -> torch.Tensor:
    """The fit's grid as ComfyUI has it: k-diffusion's sigmas, with the 0 at the end."""
    spec = predictor.spec
    times = torch.tensor(spec.sigmas, dtype=torch.float64)
    if not spec.scheduler.startswith("FlowMatch"):
        times = times / (1 - times)
    return torch.cat([times, times.new_zeros(1)]).float()


def refuse_other_caches(wrappers: dict[str, dict[str, list[Any]]]) -> None:
    """Raise if something else already caches on a model.

    Raises:
        ValueError: foreseer, EasyCache or LazyCache.
    """
    found = [key for each in wrappers.values() for key in each if key in CACHES]
    if found:
        raise ValueError(
            f"the model already has a cache ({found[0]}); take it off first: two caches on one "
            "model would forecast each other's forecasts."
        )


class ForeseerExtension(ComfyExtension):
    """What ComfyUI asks for the nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """All three."""
        return [LoadPredictor, ApplyForeseer, LearnedSampler]


async def comfy_entrypoint() -> ForeseerExtension:
    """Where ComfyUI begins."""
    return ForeseerExtension()
