"""Modular pipelines of diffusers forecast what the ordinary ones do, and refuse in the same words.

Networks of random weights, prompts as embeddings: the blocks that encode and decode are left out.
"""

from typing import Any

import pytest
import torch
from diffusers import (
    ClassifierFreeGuidance,
    FlowMatchHeunDiscreteScheduler,
    SequentialPipelineBlocks,
    WanBlocks,
)
from diffusers.modular_pipelines.flux.modular_blocks_flux import FluxCoreDenoiseStep
from diffusers.modular_pipelines.qwenimage.modular_blocks_qwenimage import QwenImageCoreDenoiseStep
from families import FAMILIES, Family, call
from test_field_settings import learned
from torch import Tensor

import foreseer as fs
from foreseer.integration.modular import ForecastDenoise
from foreseer.predictors import Newton

BLOCKS: dict[str, Any] = {
    "flux": FluxCoreDenoiseStep,
    "qwenimage": QwenImageCoreDenoiseStep,
    "wan": lambda: WanBlocks().sub_blocks["denoise"],
}
GUIDANCE = {"qwenimage": 4.0, "wan": 5.0}
ANCHORS = (0, 1, 2, 5)


def denoising(host: str) -> Any:
    """The blocks up to the last step; the ordinary pipeline leaves latents packed after it."""
    blocks = BLOCKS[host]()
    names = list(blocks.sub_blocks)
    for name in names[names.index("denoise") + 1 :]:
        del blocks.sub_blocks[name]
    return blocks


def modular(host: str, pipe: Any, denoise: Any = None) -> Any:
    """A modular pipeline on the networks of an ordinary one, with the block `denoise`."""
    blocks = {"denoise": denoise or denoising(host)}
    made = SequentialPipelineBlocks.from_blocks_dict(blocks).init_pipeline()
    made.update_components(transformer=pipe.transformer, scheduler=pipe.scheduler)
    if host in GUIDANCE:
        made.update_components(guider=ClassifierFreeGuidance(GUIDANCE[host]))
    return made


def drawn(family: Family, pipe: Any, noise: Tensor, **changes: Any) -> Tensor:
    """Final latents of a modular pipeline, from the first noise of the ordinary one."""
    names = ("true_cfg_scale",) + (("guidance_scale",) if family.host == "wan" else ())
    settings = {k: v for k, v in family.settings.items() if k not in names}
    arguments = {**family.inputs(0), **settings, "latents": noise, "output": "latents", **changes}
    for name in [n for n in arguments if n.endswith("_mask")]:
        arguments[name] = arguments[name].bool()
    latents: Tensor = pipe(**arguments)
    return latents


def first_noise(family: Family, pipe: Any) -> Tensor:
    """The latents that an ordinary pipeline's call starts with."""
    seen: list[Tensor] = []
    own = pipe.prepare_latents
    pipe.prepare_latents = lambda *args, **kwargs: seen.append(own(*args, **kwargs)) or seen[0]
    try:
        call(family, pipe, seeds=(0,))
    finally:
        del pipe.prepare_latents
    found = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    return found.clone()


@pytest.fixture(scope="module", params=BLOCKS)
def fit(request: Any, tmp_path_factory: Any) -> tuple[Family, Any, Any, Tensor]:
    """A family, its ordinary pipeline, a predictor fitted on that, and a first noise."""
    family = FAMILIES[request.param]
    pipe = family.build()
    return (
        family,
        pipe,
        learned(family, pipe, tmp_path_factory.mktemp("p")),
        first_noise(family, pipe),
    )


def refusal(run: Any) -> str:
    """What a run is refused with."""
    with pytest.raises(fs.PredictorMismatch) as caught:
        run()
    return str(caught.value)


def test_a_modular_pipeline_forecasts_what_the_ordinary_one_does_bit_for_bit(fit):
    family, pipe, predictor, noise = fit
    plain = call(family, pipe, seeds=(0,), latents=noise)
    with fs.forecasting(pipe, predictor) as run:
        expected = call(family, pipe, seeds=(0,), latents=noise)
        ran = run.report().anchors
    assert not torch.equal(plain, expected)
    block = ForecastDenoise(denoising(family.host), predictor)
    made = modular(family.host, pipe, block)
    assert torch.equal(drawn(family, made, noise), expected)
    block = made.blocks.sub_blocks["denoise"]  # a pipeline has its blocks copied
    assert block.report.anchors == ran == list(ANCHORS)
    with fs.forecasting(modular(family.host, pipe), predictor) as run:  # without the block
        assert torch.equal(drawn(family, run.session.pipe, noise), expected)
    assert torch.equal(drawn(family, modular(family.host, pipe), noise), plain)


def test_a_modular_pipeline_refuses_what_the_ordinary_one_refuses_in_the_same_words(fit):
    family, pipe, predictor, noise = fit
    made = modular(family.host, pipe, ForecastDenoise(denoising(family.host), predictor))
    weight = next(pipe.transformer.parameters())
    kept, euler = weight.detach().clone(), pipe.scheduler

    def ordinary(**changes: Any) -> str:
        with fs.forecasting(pipe, predictor):
            return refusal(lambda: call(family, pipe, seeds=(0,), latents=noise, **changes))

    told = refusal(lambda: drawn(family, made, noise, num_inference_steps=7))
    assert told == ordinary(num_inference_steps=7)
    assert "fitted on 8 steps, this run has 7" in told

    pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    made.update_components(scheduler=pipe.scheduler)
    told = refusal(lambda: drawn(family, made, noise))
    assert told == refusal(lambda: fs.attach(pipe, predictor))
    assert "found FlowMatchHeunDiscreteScheduler" in told
    pipe.scheduler = euler
    made.update_components(scheduler=euler)

    weight.data.mul_(2)
    told = refusal(lambda: drawn(family, made, noise))
    assert told == refusal(lambda: fs.attach(pipe, predictor))
    assert "fitted on another host: weights" in told
    weight.data.copy_(kept)

    if family.host in GUIDANCE:
        made.update_components(guider=ClassifierFreeGuidance(2.5))
        name = "true_cfg_scale" if family.host == "qwenimage" else "guidance_scale"
        told = refusal(lambda: drawn(family, made, noise))
        assert told == ordinary(**{name: 2.5})
        assert "2.5" in told
    assert not fs.detach(pipe)  # nothing was left behind


def test_a_loop_without_the_timesteps_it_runs_over_is_refused():
    loop = BLOCKS["flux"]().sub_blocks["denoise"]
    with pytest.raises(ValueError, match="FluxDenoiseStep is a loop.*wrap the block around it"):
        ForecastDenoise(loop, Newton(1), (0, 1, 4))
