"""Weights are the fit's in whatever layout another library keeps them, or they are refused."""

import dataclasses
import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from engine_stubs import ROOT
from tiny_hosts import STEPS, tiny_flux
from torch import nn

import foreseer as fs
from foreseer.checkpoints.spec import VALUES, PredictorSpec
from foreseer.integration.host.clock import flow_sigmas
from foreseer.integration.host.fingerprint import host_fingerprint, values_digest
from foreseer.predictors import L2P

ANCHORS = (0, 1, 4)


def otherwise(network: nn.Module) -> nn.Module:
    """The same weights under other names, three in one where they have one width."""
    weights = [p.detach().clone() for p in network.parameters()]
    made = nn.Module()
    for place, weight in enumerate(reversed(weights)):
        parts = [weight.t().contiguous()] if weight.ndim == 2 else [*weight.chunk(2)]
        for part, values in enumerate(parts):
            made.register_parameter(f"w{place}_{part}", nn.Parameter(values.contiguous()))
    return made


def predictor_of(network: nn.Module) -> L2P:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(STEPS)
    predictor = L2P(STEPS, ANCHORS, 1)
    predictor.spec = PredictorSpec(
        tap="output",
        anchors=ANCHORS,
        sigmas=tuple(flow_sigmas(scheduler)),
        host=host_fingerprint(network) | {VALUES: values_digest(network)},
        scheduler="FlowMatchEulerDiscreteScheduler",
        num_branches=1,
        guidance_scale=1.0,
        dtype="float32",
    )
    return predictor


def tuned(network: nn.Module) -> nn.Module:
    """A fine-tune of the same size: a LoRA of one layer is fused in."""
    layer = next(module for module in network.modules() if isinstance(module, nn.Linear))
    up, down = torch.randn(layer.out_features, 1), torch.randn(1, layer.in_features)
    layer.weight.data += 0.05 * up @ down
    return network


def test_the_digest_is_of_the_values_and_of_nothing_else():
    network = tiny_flux()
    digest = values_digest(network)
    assert values_digest(otherwise(network)) == digest
    assert values_digest(network.to(torch.bfloat16)) == digest  # the fit's in another dtype
    assert values_digest(tuned(tiny_flux())) != digest
    one = tiny_flux()
    next(one.parameters()).data.flatten()[0].mul_(-1)
    assert values_digest(one) != digest
    two = tiny_flux()
    assert values_digest(two, two) != digest


def test_a_model_function_s_network_is_compared_by_its_values():
    predictor = predictor_of(tiny_flux())
    fs.forecast_model(lambda x, sigma: x, predictor, otherwise(tiny_flux()))
    words = r"fitted on another host: weights \(fine-tuned, or with a LoRA\?\)"
    with pytest.raises(fs.PredictorMismatch, match=words):
        fs.forecast_model(lambda x, sigma: x, predictor, otherwise(tuned(tiny_flux())))
    host = {name: value for name, value in predictor.spec.host.items() if name != VALUES}
    predictor.spec = dataclasses.replace(predictor.spec, host=host)  # of an earlier release
    fs.forecast_model(lambda x, sigma: x, predictor, otherwise(tuned(tiny_flux())))
    with pytest.raises(fs.PredictorMismatch, match="number of parameters"):
        fs.forecast_model(lambda x, sigma: x, predictor, nn.Linear(2, 2))


@pytest.mark.skipif(not ROOT.exists(), reason="integrations/ is of the checkout")
def test_comfyui_compares_values_once_for_a_model_and_takes_the_order_from_the_file(monkeypatch):
    spec = importlib.util.spec_from_file_location("comfy", ROOT / "comfyui" / "sampling.py")
    assert spec is not None and spec.loader is not None
    sampling: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sampling)
    predictor = predictor_of(tiny_flux())
    forecast = sampling.Forecast(predictor, "as recorded")
    seen: list[Any] = []
    monkeypatch.setattr(
        "foreseer.integration.host.fingerprint.values_digest",
        lambda host: seen.append(1) or values_digest(host),
    )

    def begin(host: nn.Module) -> None:
        model = SimpleNamespace(diffusion_model=host, model_sampling=type("CONST", (), {})())
        patcher = SimpleNamespace(model=model, patches={})
        guider = SimpleNamespace(model_patcher=patcher, conds={}, cfg=1.0)
        sigmas = torch.tensor([*predictor.spec.sigmas, 0.0])
        forecast.begin(guider, sigmas, SimpleNamespace(__name__="sample_euler"))

    host = otherwise(tiny_flux())
    begin(host)
    begin(host)
    assert len(seen) == 1
    tune = next(host.parameters())
    tune.data.mul_(1.5)
    with pytest.raises(fs.PredictorMismatch, match="weights .fine-tuned"):
        begin(host)
    tune.data.div_(1.5)
    begin(host)
    assert len(seen) == 3
    with pytest.raises(fs.PredictorMismatch, match="weights .fine-tuned"):
        begin(otherwise(tuned(tiny_flux())))
    two = L2P(STEPS, ANCHORS, 2)
    for known, told_order, found in (
        ("conditional", "as recorded", "conditional"),
        ("unconditional", "unconditional", "unconditional"),
        ("", "conditional", "conditional"),
        ("", "as recorded", None),
        ("conditional", "unconditional", None),
        ("conditional", "no guidance", None),
    ):
        two.spec = dataclasses.replace(predictor.spec, num_branches=2, first_branch=known)
        if found is not None:
            assert sampling.Forecast(two, told_order).first_branch == found
            continue
        with pytest.raises(fs.PredictorMismatch, match="say which branch the pipeline of the fit"):
            sampling.Forecast(two, told_order)
