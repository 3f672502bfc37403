"""Another model, other steps and another sampler are refused everywhere in the same words.

One predictor of one tiny FLUX, in every place that takes predictors. Engines and ComfyUI are stubs
of what the plugins and nodes plug into; the pipelines, modular blocks and networks are real.
"""

import importlib.util
import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from engine_stubs import ROOT, enabled, omni_runner, sglang_hook
from families import FAMILIES, call
from test_field_settings import learned
from test_modular import denoising, drawn, first_noise, modular

import foreseer as fs
from foreseer.integration.modular import ForecastDenoise

pytestmark = pytest.mark.skipif(not ROOT.exists(), reason="integrations/ is of the checkout")
FAMILY = FAMILIES["flux"]
Run = Callable[..., Any]


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of one that was fitted on the pipeline as it is built."""
    folder = tmp_path_factory.mktemp("p")
    fitted = learned(FAMILY, FAMILY.build(), folder)
    return str(fs.save(fitted, str(folder / "saved")))


def in_a_pipeline(pipe: Any, predictor: str, monkeypatch: Any) -> Run:
    fs.attach(pipe, predictor)
    return lambda **changes: call(FAMILY, pipe, **changes)


def in_a_function(pipe: Any, predictor: str, monkeypatch: Any) -> Run:
    network, scheduler = pipe.transformer, pipe.scheduler
    own, now = network.forward, SimpleNamespace(f=None, sigmas=None)

    def forward(**kwargs: Any) -> Any:
        if now.sigmas is not scheduler.sigmas:
            now.sigmas = scheduler.sigmas
            given = {"sigmas": now.sigmas, "model": network, "scheduler": scheduler}
            now.f = fs.forecast_model(lambda x, s: own(**kwargs)[0], predictor, **given)
        sigma = now.sigmas[scheduler.step_index or 0]
        return (now.f(kwargs["hidden_states"], sigma),)

    network.forward = forward
    return lambda **changes: call(FAMILY, pipe, **changes)


def in_vllm_omni(pipe: Any, predictor: str, monkeypatch: Any) -> Run:
    enabled(omni_runner(monkeypatch), predictor, pipe, 8)
    return lambda **changes: call(FAMILY, pipe, **changes)


def in_sglang(pipe: Any, predictor: str, monkeypatch: Any) -> Run:
    enter = sglang_hook(monkeypatch, predictor)(pipe)
    own, steps = pipe.transformer.forward, itertools.count()

    def forward(**kwargs: Any) -> Any:
        enter(next(steps), 0)
        return own(**kwargs)

    pipe.transformer.forward = forward
    return lambda **changes: call(FAMILY, pipe, **changes)


def in_comfyui(pipe: Any, predictor: str, monkeypatch: Any) -> Run:
    file = Path(ROOT) / "comfyui" / "sampling.py"
    spec = importlib.util.spec_from_file_location("comfyui_sampling", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    forecast = module.Forecast(fs.load(predictor), "no guidance")
    sampling = type("CONST", (), {})()
    model = SimpleNamespace(diffusion_model=pipe.transformer, model_sampling=sampling)
    patcher = SimpleNamespace(model=model, patches={})
    guider = SimpleNamespace(model_patcher=patcher, conds={}, cfg=1.0)
    name = type(pipe.scheduler).__name__.replace("FlowMatchEulerDiscreteScheduler", "sample_euler")

    def run(**changes: Any) -> None:
        other = FAMILY.build()
        call(FAMILY, other, **changes)  # for its sigmas
        forecast.begin(guider, other.scheduler.sigmas, SimpleNamespace(__name__=name))

    return run


def in_modular_blocks(pipe: Any, predictor: str, monkeypatch: Any) -> Run:
    made = modular("flux", pipe, ForecastDenoise(denoising("flux"), predictor))
    noise = first_noise(FAMILY, pipe)
    return lambda **changes: drawn(FAMILY, made, noise, **changes)


PLACES = {
    place.__name__.removeprefix("in_"): place
    for place in (
        in_a_pipeline,
        in_a_function,
        in_vllm_omni,
        in_sglang,
        in_comfyui,
        in_modular_blocks,
    )
}


def wider() -> Any:
    """Another model: a block less, in the classes and the configuration of the other."""
    pipe = FAMILY.build()
    del pipe.transformer.single_transformer_blocks[-1]
    return pipe


class OtherScheduler(FlowMatchEulerDiscreteScheduler):
    """Takes sigmas as this pipeline gives them, which diffusers' others for flows do not."""


def resampled() -> Any:
    pipe = FAMILY.build()
    pipe.scheduler = OtherScheduler.from_config(pipe.scheduler.config)
    return pipe


@pytest.mark.parametrize(
    ("build", "changes", "words"),
    [
        (
            FAMILY.build,
            {"num_inference_steps": 7},
            "fitted on 8 steps, this run has 7; set num_inf",
        ),
        (resampled, {}, "fitted under FlowMatchEulerDiscreteScheduler, found OtherScheduler"),
        (wider, {}, "fitted on another host: number of parameters is "),
    ],
    ids=["other steps", "another sampler", "another model"],
)
def test_every_place_refuses_in_the_same_words(build, changes, words, predictor, monkeypatch):
    told = {}
    for name, place in PLACES.items():
        with monkeypatch.context() as patch, pytest.raises(fs.PredictorMismatch) as caught:
            place(build(), predictor, patch)(**changes)
        told[name] = str(caught.value)
    assert len(told) == 6 and set(told.values()) == {told["a_pipeline"]}, told
    assert words in told["a_pipeline"]
