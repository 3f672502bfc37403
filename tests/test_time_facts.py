"""Where a transformer makes its modulation vector and what time it is told, on the real classes."""

from typing import Any

import pytest
from families import FAMILIES, MORE, call
from nightly import nightly

import foreseer
from foreseer.integration.host.hosts import transformer_of
from foreseer.integration.host.trunk import (
    TIME_FACTS,
    modulation_width,
    modulations,
    time_facts,
    wave_places,
)
from foreseer.trajectories.prompts import Item
from foreseer.trajectories.recorder import record

HOSTS = {
    "dit": "DiTTransformer2DModel",
    "flux": "FluxTransformer2DModel",
    "flux2": "Flux2Transformer2DModel",
    "hunyuan_video15": "HunyuanVideo15Transformer3DModel",
    "qwenimage": "QwenImageTransformer2DModel",
    "sd3": "SD3Transformer2DModel",
    "wan": "WanTransformer3DModel",
}


def test_every_row_is_tested():
    assert set(HOSTS.values()) == set(TIME_FACTS)


@pytest.mark.parametrize("host", HOSTS)
def test_the_vector_is_of_the_width_told_and_time_is_scaled_as_told(host):
    family = (FAMILIES | MORE)[host]
    pipe = family.build()
    transformer: Any = transformer_of(pipe)
    assert type(transformer).__name__ == HOSTS[host] and len(wave_places(transformer)) >= 1
    times = []
    transformer.register_forward_pre_hook(
        lambda module, args, kwargs: times.append(kwargs["timestep"].flatten()[0]),
        with_kwargs=True,
    )
    with modulations(transformer) as found:
        call(family, pipe, (0,))
    assert {each.shape[-1] for each in found} == {modulation_width(transformer)}
    assert all(each.ndim == 2 for each in found) and len(found) % len(times) == 0
    if host == "dit":  # of noise steps, not of flow times
        return
    sigmas = pipe.scheduler.sigmas[0].float()
    told, scale = float(times[0]), time_facts(transformer).time_scale
    assert told == pytest.approx(scale * float(sigmas), abs=scale / 1000)  # UniPC's are whole


@pytest.mark.slow
@pytest.mark.parametrize("host", nightly(HOSTS, ["wan"]))
def test_disca_is_fitted_on_the_host(host, tmp_path):
    family = (FAMILIES | MORE)[host]
    items = [Item(i, i, family.inputs(i)) for i in range(6)]
    options = {"taps": ["hidden", "output"], "features": "full", "batch_size": 2}
    record(family.build(), items, tmp_path, **options, **family.settings)
    few = {"num_heads": 1, "mse_epochs": 1, "closed_epochs": 1}
    predictor = foreseer.fit(
        str(tmp_path), anchors=[0, 2, 5], method="disca", pipeline=family.build(), **few
    )
    pipe = family.build()
    with foreseer.forecasting(pipe, predictor) as run:
        call(family, pipe, (7,))
    assert str(run.report()).startswith("5 of 8 steps forecast")
    if host == "hunyuan_video15":  # the network is given a picture's channels beside the sample's
        options = {"anchors": [0, 2, 5], "pipeline": family.build(), "gan_epochs": 1, **few}
        with pytest.raises(ValueError, match=r"given more than the sample.*gan_epochs: 0"):
            foreseer.fit(str(tmp_path), method="disca", **options)
