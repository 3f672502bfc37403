"""The wrapper of the ComfyUI nodes, called by a stand-in of ComfyUI's sampling: no ComfyUI here.

tests/test_comfyui.py drives the same in the real one, where there is one.
"""

import importlib.util
import uuid
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import foreseer as fs

FILE = Path(__file__).parents[1] / "integrations" / "comfyui" / "sampling.py"
if not FILE.exists():
    pytest.skip("the nodes are not beside the tests of a wheel", allow_module_level=True)

ROWS = "zoo:emoji_flux_l2p_8"


class CONST:
    """By the name of ComfyUI's flow models."""


def sample_euler() -> None:
    """By the name of ComfyUI's Euler."""


@pytest.fixture(scope="module")
def sampling():
    spec = importlib.util.spec_from_file_location("comfyui_sampling", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pipe():
    return fs.load_pipeline("zoo:emoji_flux")


def guider_of(pipe, cfg: float = 3.0) -> SimpleNamespace:
    """A stand-in of ComfyUI's guider and of what it holds."""
    model = SimpleNamespace(diffusion_model=pipe.transformer, model_sampling=CONST())
    patcher = SimpleNamespace(model=model, patches={})
    return SimpleNamespace(model_patcher=patcher, conds={"positive": [{}]}, cfg=cfg)


def test_the_wrapper_in_a_stand_in_draws_the_pipelines_image_bit_for_bit(sampling, pipe):
    noise = torch.randn(1, 64, 48, generator=torch.Generator().manual_seed(0))
    predictor = fs.load(ROWS)
    predictor.first_time = 0.98
    with fs.forecasting(pipe, predictor):
        expected = pipe("octopus", latents=noise, output_type="latent").images
    forecast = sampling.Forecast(predictor, "conditional")
    sigmas = torch.tensor([*predictor.spec.sigmas, 0.0])
    forecast.begin(guider_of(pipe), sigmas, sample_euler)
    plain, calls, uuids = pipe.transformer.forward, [], [uuid.uuid4(), uuid.uuid4()]

    def executor(x, sigma, options, **kwargs):
        calls.append(len(x))
        return plain(x, timestep=sigma, **kwargs)[0]

    def forward(x, timestep, **kwargs):
        options = {"sigmas": timestep[:1], "uuids": uuids, "cond_or_uncond": [0, 1]}
        return (forecast(executor, x, timestep, options, **kwargs),)

    pipe.transformer.forward = forward
    try:
        found = pipe("octopus", latents=noise, output_type="latent").images
    finally:
        del pipe.transformer.forward
        forecast.end()
    assert torch.equal(found, expected)
    assert calls == [2] * 8 and forecast.run.report.anchors == list(predictor.spec.anchors)


def test_the_wrapper_in_a_stand_in_refuses_in_the_usual_words(sampling, pipe):
    predictor = fs.load(ROWS)
    forecast = sampling.Forecast(predictor, "conditional")
    sigmas = torch.tensor([*predictor.spec.sigmas, 0.0])
    x = torch.zeros(1, 64, 48)
    with pytest.raises(ValueError, match="outside of a sampling"):
        forecast(None, x, {})
    with pytest.raises(fs.PredictorMismatch, match="fitted on 50 steps, this run has 20"):
        forecast.begin(guider_of(pipe), sigmas[-21:], sample_euler)
    with pytest.raises(fs.PredictorMismatch, match="fitted under FlowMatch.*, found module"):
        forecast.begin(guider_of(pipe), sigmas, SimpleNamespace(sampler_function=type(sampling)))
    forecast.begin(guider_of(pipe), sigmas, sample_euler)
    with pytest.raises(fs.UnsupportedHost, match=r"not told \['cond_or_uncond', 'sigmas', 'uuids'"):
        forecast(None, x, {})
    options = {"sigmas": sigmas[:1], "uuids": [1], "cond_or_uncond": [0]}
    with pytest.raises(fs.UnsupportedHost, match="returned list, expected one tensor"):
        forecast(lambda *args: [x], x, options)
    forecast(lambda *args: x, x, options)
    with pytest.raises(fs.PredictorMismatch, match=r"fitted with 2 guidance branch\(es\) per step"):
        forecast(lambda *args: x, x, {**options, "sigmas": sigmas[1:2]})


def test_rows_of_parts_are_refused_since_comfyui_lays_tokens_out_in_its_own_way(sampling):
    plain = fs.load(ROWS)
    parts = fs.predictors.ChannelGroups([0, 1] * 24)
    predictor = fs.predictors.L2P(plain.num_steps, plain.anchors, 2, partition=parts)
    predictor.spec = plain.spec
    with pytest.raises(fs.UnsupportedHost, match="L2P looks at more than whole outputs"):
        sampling.Forecast(predictor, "conditional")
