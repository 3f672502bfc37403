"""The plugins for vLLM-Omni and SGLang forecast and refuse on stubs of what they plug into.

The stubs have the names and signatures of vllm-omni 0.30.0 and sglang 0.5.23, which were read and
not run; the networks, the scheduler and the loop are real, at tiny size.
"""

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from engine_stubs import ROOT, enabled, omni_runner, sglang_hook
from tiny_hosts import STEPS, tiny_flux
from torch import Tensor

import foreseer as fs
from foreseer.checkpoints.spec import PredictorSpec
from foreseer.integration.host.clock import flow_sigmas
from foreseer.integration.host.fingerprint import host_fingerprint
from foreseer.predictors import L2P

pytestmark = pytest.mark.skipif(not ROOT.exists(), reason="integrations/ is of the checkout")
ANCHORS = (0, 1, 4)


class Pipeline:
    """A loop like the engines': two calls a step, conditional first."""

    def __init__(self) -> None:
        self.transformer = tiny_flux()
        self.scheduler: Any = FlowMatchEulerDiscreteScheduler()

    def __call__(self, steps: int = STEPS, branches: int = 2, enter: Any = None) -> Tensor:
        self.scheduler.set_timesteps(steps)
        draw = torch.Generator().manual_seed(0)
        x = torch.randn(1, 4, 16, generator=draw)
        prompts = torch.randn(2, 1, 3, 12, generator=draw)
        ids = torch.zeros(4, 3), torch.zeros(3, 3)
        for i, t in enumerate(self.scheduler.timesteps):
            found = []
            for branch in range(branches):
                if enter is not None:
                    enter(i, branch)
                out = self.transformer.forward(
                    hidden_states=x,
                    timestep=t.expand(1) / 1000,
                    encoder_hidden_states=prompts[branch],
                    pooled_projections=prompts[branch][:, 0],
                    img_ids=ids[0],
                    txt_ids=ids[1],
                    return_dict=False,
                )
                found.append(out[0])
            v = found[-1] + 2.0 * (found[0] - found[-1])
            x = self.scheduler.step(v, t, x, return_dict=False)[0]
        return x


@pytest.fixture
def predictor(tmp_path: Path) -> str:
    """Rows of random numbers, written to a file."""
    pipe, learned = Pipeline(), L2P(STEPS, ANCHORS, 2, first_time=0.9)
    torch.manual_seed(0)
    learned.weight += 0.1 * torch.randn_like(learned.weight).tril(-1)
    pipe.scheduler.set_timesteps(STEPS)
    spec = PredictorSpec(
        tap="output",
        anchors=ANCHORS,
        sigmas=tuple(flow_sigmas(pipe.scheduler)),
        host=host_fingerprint(pipe.transformer),
        scheduler="FlowMatchEulerDiscreteScheduler",
        num_branches=2,
        guidance_scale=1.0,
        dtype="float32",
    )
    learned.spec = spec
    return str(fs.save(learned, str(tmp_path / "p")))


def told(run: Any) -> str:
    with pytest.raises(fs.PredictorMismatch) as caught:
        run()
    return str(caught.value)


def expected(predictor: str) -> Tensor:
    """What `fs.attach` makes of the same loop."""
    pipe = Pipeline()
    with fs.forecasting(pipe, predictor):
        return pipe()


@pytest.fixture
def omni(monkeypatch: Any) -> Any:
    return omni_runner(monkeypatch)


def test_vllm_omni_forecasts_what_a_pipeline_does_bit_for_bit(omni, predictor):
    pipe = Pipeline()
    plain = pipe()
    backend = enabled(omni, predictor, pipe, STEPS)
    assert backend.is_enabled()
    first = pipe()
    backend.refresh(pipe, STEPS)
    assert torch.equal(pipe(), first)
    assert torch.equal(first, expected(predictor)) and not torch.equal(first, plain)
    assert backend.served.forecast.report().anchors == list(ANCHORS)


def test_vllm_omni_keeps_its_own_backends(omni):
    assert omni.get_cache_backend("none", {}) is None
    with pytest.raises(ValueError, match="Unsupported cache backend: other"):
        omni.get_cache_backend("other", {})
    with pytest.raises(ValueError, match="needs a predictor"):
        omni.get_cache_backend("foreseer", {})


def refuse_as_a_pipeline_does(predictor: str, attach: Any) -> None:
    """Wrong steps, sampler, model and guidance; `attach(pipe)` gives what runs it."""
    pipe, other = Pipeline(), Pipeline()
    with fs.forecasting(other, predictor):
        words = told(lambda: other(steps=7))
        assert told(lambda: attach(pipe)(steps=7)) == words
        assert "fitted on 8 steps, this run has 7" in words
        words = told(lambda: other(branches=1))
        assert told(lambda: attach(Pipeline())(branches=1)) == words
        assert "fitted with 2 guidance branch(es) per step, this run has 1" in words
    pipe, other = Pipeline(), Pipeline()
    pipe.scheduler = other.scheduler = FlowMatchHeunDiscreteScheduler()
    assert told(lambda: attach(pipe)()) == told(lambda: fs.attach(other, predictor))
    wide = Pipeline()
    wide.transformer = tiny_flux(guidance_embeds=True)
    del wide.transformer.__dict__["_internal_dict"]  # an engine's network has no such config
    assert "fitted on another host: number of parameters" in told(lambda: attach(wide)())


def test_vllm_omni_refuses_in_the_words_of_a_pipeline(omni, predictor):
    def attach(pipe: Any) -> Any:
        enabled(omni, predictor, pipe, STEPS)
        return pipe

    refuse_as_a_pipeline_does(predictor, attach)


@pytest.fixture
def sglang(monkeypatch: Any, predictor: str) -> Any:
    """Gives what runs a pipeline under the plugin."""
    hook = sglang_hook(monkeypatch, predictor)

    def attach(pipe: Any) -> Any:
        enter = hook(pipe)
        return lambda **changes: pipe(enter=enter, **changes)

    return attach


def test_sglang_forecasts_what_a_pipeline_does_bit_for_bit(sglang, predictor):
    run = sglang(Pipeline())
    first = run()
    assert torch.equal(run(), first)
    assert torch.equal(first, expected(predictor))


def test_sglang_s_branches_are_those_of_a_fit_that_ran_the_unconditional_one_first(
    predictor, monkeypatch, tmp_path
):
    other = fs.load(predictor)
    other.weight.copy_(other.weight.flip(0))
    other.spec = dataclasses.replace(other.spec, first_branch="unconditional")
    folder = str(fs.save(other, str(tmp_path / "other")))
    pipe = Pipeline()
    enter = sglang_hook(monkeypatch, folder)(pipe)
    assert torch.equal(pipe(enter=enter), expected(predictor))


def test_sglang_refuses_in_the_words_of_a_pipeline(sglang, predictor):
    refuse_as_a_pipeline_does(predictor, sglang)


def test_the_entry_points_name_what_is_there():
    for folder, group in (
        ("vllm_omni", "vllm_omni.general_plugins"),
        ("sglang", "sglang.multimodal_gen.plugins"),
    ):
        project = tomllib.loads((ROOT / folder / "pyproject.toml").read_text())["project"]
        module, _, function = project["entry-points"][group]["foreseer"].partition(":")
        source = (ROOT / folder / f"{module}.py").read_text()
        assert f"\ndef {function}(" in source
