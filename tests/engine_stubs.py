"""Stubs of what the plugins for vLLM-Omni and SGLang plug into, and pipelines in their places.

They have the names and signatures of vllm-omni 0.30.0 and sglang 0.5.23, which were read and not
run.
"""

import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent / "integrations"


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


class Registry:
    """Of the engine's: targets and what goes around them."""

    def __init__(self) -> None:
        self.hooks: dict[str, Any] = {}

    def register(self, target: str, hook: Any, hook_type: str) -> None:
        assert hook_type == "around"
        self.hooks[target] = hook


def omni_runner(monkeypatch: Any) -> Any:
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


def enabled(runner: Any, predictor: str, pipe: Any, steps: int) -> Any:
    """The backend, at work on a pipeline as the engine puts it there."""
    backend = runner.get_cache_backend("foreseer", {"predictor": predictor})
    backend.enable(pipe)
    backend.refresh(pipe, steps)
    return backend


def sglang_hook(monkeypatch: Any, predictor: str) -> Callable[[Any], Any]:
    """Puts the plugin for SGLang around a pipeline's network, as its registry would.

    What it gives takes a pipeline, and gives `enter(step, branch)`, which the engine's loop calls
    before each call of the network: the request begins anew with `enter(0, 0)`.
    """
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
        network, state = pipe.transformer, types.SimpleNamespace(request=None)
        own, hook = type(network).forward, registry.hooks[plugin.TARGETS[0]]
        network.forward = lambda *args, **kwargs: hook(own, network, *args, **kwargs)

        def enter(step: int, branch: int) -> None:
            if step == 0 and branch == 0:
                state.request = types.SimpleNamespace(
                    extra={}, is_warmup=False, scheduler=pipe.scheduler
                )
            state.request.is_cfg_negative = branch == 1
            context.now = types.SimpleNamespace(current_timestep=step, forward_batch=state.request)

        return enter

    return attach
