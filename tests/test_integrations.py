"""The plugins for vLLM-Omni and SGLang forecast and refuse on stubs of what they plug into.

The stubs have the names and signatures of vllm-omni 0.30.0 and sglang 0.5.23, which were read and
not run; the networks, the scheduler and the loop are real, at tiny size.
"""

import importlib.util
import sys
import tomllib
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from tiny_hosts import STEPS, tiny_flux
from torch import Tensor

import foreseer as fs
from foreseer.checkpoints.spec import PredictorSpec
from foreseer.integration.host.clock import flow_sigmas
from foreseer.integration.host.fingerprint import host_fingerprint
from foreseer.predictors import L2P

ROOT = Path(__file__).parent.parent / "integrations"
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
    pipe, learned = Pipeline(), L2P(STEPS, ANCHORS, 2)
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


def stub(monkeypatch: Any, name: str, **values: Any) -> Any:
    """A module of that name, and the packages it lies in."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        path = ".".join(parts[:end])
        if path not in sys.modules:
            module = types.ModuleType(path)
            module.__path__ = []  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, path, module)
            if end > 1:
                setattr(sys.modules[".".join(parts[: end - 1])], parts[end - 1], module)
    vars(sys.modules[name]).update(values)
    return sys.modules[name]


def loaded(folder: str, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / folder / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def told(run: Any) -> str:
    with pytest.raises(fs.PredictorMismatch) as caught:
        run()
    return str(caught.value)


def expected(predictor: str) -> Tensor:
    """What `fs.attach` makes of the same loop."""
    pipe = Pipeline()
    with fs.forecasting(pipe, predictor):
        return pipe()


class Config:
    def __init__(self, **values: Any) -> None:
        vars(self).update(values)

    from_dict = classmethod(lambda cls, values: cls(**values))


class CacheBackend:
    def __init__(self, config: Any) -> None:
        self.config, self.enabled = config, False

    def is_enabled(self) -> bool:
        return self.enabled


def other_backend(cache_backend: Any, cache_config: Any) -> Any:
    if cache_backend in (None, "none"):
        return None
    raise ValueError(f"Unsupported cache backend: {cache_backend}.")


@pytest.fixture
def omni(monkeypatch: Any) -> Any:
    """The plugin for vLLM-Omni, on stubs; the module its runner takes backends from."""
    base = "vllm_omni.diffusion"
    stub(monkeypatch, f"{base}.cache.selector", get_cache_backend=other_backend)
    stub(monkeypatch, f"{base}.cache.base", CacheBackend=CacheBackend)
    stub(monkeypatch, f"{base}.data", DiffusionCacheConfig=Config)
    name = f"{base}.worker.diffusion_model_runner"
    runner = stub(monkeypatch, name, get_cache_backend=other_backend)
    plugin = loaded("vllm_omni", "foreseer_vllm_omni")
    plugin.register()
    plugin.register()
    return runner


def enabled(omni: Any, predictor: str, pipe: Any) -> Any:
    backend = omni.get_cache_backend("foreseer", {"predictor": predictor})
    backend.enable(pipe)
    backend.refresh(pipe, STEPS)
    return backend


def test_vllm_omni_forecasts_what_a_pipeline_does_bit_for_bit(omni, predictor):
    pipe = Pipeline()
    plain = pipe()
    backend = enabled(omni, predictor, pipe)
    assert backend.is_enabled()
    first = pipe()
    backend.refresh(pipe, STEPS)
    assert torch.equal(pipe(), first)
    assert torch.equal(first, expected(predictor)) and not torch.equal(first, plain)
    assert backend.forecast.report().anchors == list(ANCHORS)


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
        enabled(omni, predictor, pipe)
        return pipe

    refuse_as_a_pipeline_does(predictor, attach)


class Registry:
    """Of the engine's: targets and what goes around them."""

    def __init__(self) -> None:
        self.hooks: dict[str, Any] = {}

    def register(self, target: str, hook: Any, hook_type: str) -> None:
        assert hook_type == "around"
        self.hooks[target] = hook


@pytest.fixture
def sglang(monkeypatch: Any, predictor: str) -> Any:
    """Puts the plugin for SGLang around a pipeline's network, as its registry would."""
    runtime, context = "sglang.multimodal_gen.runtime", types.SimpleNamespace(now=None)
    registry = Registry()
    kinds = types.SimpleNamespace(AROUND="around")
    name = f"{runtime}.managers.forward_context"
    stub(monkeypatch, name, get_forward_context_or_none=lambda: context.now)
    name = f"{runtime}.platforms.plugins"
    stub(monkeypatch, name, HookRegistry=registry, HookType=kinds)
    plugin = loaded("sglang", "foreseer_sglang")
    monkeypatch.delenv("FORESEER_PREDICTOR", raising=False)
    with pytest.raises(ValueError, match="FORESEER_PREDICTOR is not set"):
        plugin.register()
    monkeypatch.setenv("FORESEER_PREDICTOR", predictor)
    plugin.register()
    assert set(registry.hooks) == set(plugin.TARGETS)

    def attach(pipe: Any) -> Any:
        network = pipe.transformer
        own, hook = type(network).forward, registry.hooks[plugin.TARGETS[0]]
        network.forward = lambda *args, **kwargs: hook(own, network, *args, **kwargs)

        def run(**changes: Any) -> Tensor:
            request = types.SimpleNamespace(extra={}, is_warmup=False, scheduler=pipe.scheduler)

            def enter(step: int, branch: int) -> None:
                request.is_cfg_negative = branch == 1
                context.now = types.SimpleNamespace(current_timestep=step, forward_batch=request)

            return pipe(enter=enter, **changes)

        return run

    return attach


def test_sglang_forecasts_what_a_pipeline_does_bit_for_bit(sglang, predictor):
    run = sglang(Pipeline())
    first = run()
    assert torch.equal(run(), first)
    assert torch.equal(first, expected(predictor))


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
