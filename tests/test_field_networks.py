"""Every network of a pipeline that denoises is forecast, or the report names it and counts it."""

import functools
from types import SimpleNamespace

import pytest
import torch
from families import MORE, call
from families.family import noise
from field_pipelines import IDEOGRAM
from tiny_hosts import pipeline as tiny
from tiny_hosts import run, tiny_flux

from foreseer.checkpoints.format import load_predictor, save_predictor
from foreseer.checkpoints.spec import PredictorMismatch
from foreseer.evaluation.verify import (
    check_abort,
    check_detached,
    check_tap,
    final_latents,
    footprint,
)
from foreseer.integration.forecasting import forecasting
from foreseer.integration.host.hosts import others_of, transformers_of
from foreseer.predictors.rules import Reuse, Taylor
from foreseer.training.least_squares import fit_rows
from foreseer.trajectories.inspect_pipeline import inspected
from foreseer.trajectories.prompts import Item
from foreseer.trajectories.recorder import record
from foreseer.trajectories.recording import Recording

pytestmark = pytest.mark.fault
ANCHORS = (0, 1, 4)


def counted(pipe, *names):
    """The calls of networks that reach their last layer, by name, while the test goes on."""
    calls = dict.fromkeys(names, 0)

    def count(name, *_):
        calls[name] += 1

    for name in names:
        *_, last = getattr(pipe, name).children()
        last.register_forward_pre_hook(functools.partial(count, name))
    return calls


def test_field_networks_guidance_by_a_second_network_is_forecast_too():
    pipe = IDEOGRAM.build()
    calls = counted(pipe, "transformer", "unconditional_transformer")
    with forecasting(pipe, Taylor(1), ANCHORS) as attached:
        call(IDEOGRAM, pipe, (0,))
    assert calls == {"transformer": 3, "unconditional_transformer": 3}
    text = str(attached.report())
    assert text.startswith("5 of 8 steps forecast: 2.7 x fewer evaluations")
    assert "calls of the network: 6 computed, 10 forecast" in text and "never" not in text


@pytest.mark.parametrize("tap", ["output", "hidden"])
def test_field_networks_both_are_put_back_bit_for_bit(tap):
    pipe = IDEOGRAM.build()
    again = functools.partial(call, IDEOGRAM, pipe)
    expected, before = final_latents(pipe, again), footprint(pipe)
    checks = [*check_tap(pipe, again, tap, expected), check_abort(pipe, again, tap, expected)]
    checks.append(check_detached(pipe, before))
    assert len(checks) == 5 and not [check for check in checks if check.passed is False]


@pytest.mark.parametrize("tap", ["output", "hidden"])
def test_field_networks_a_fit_has_a_branch_for_each(tap, tmp_path):
    pipe = IDEOGRAM.build()
    items = [Item(i, i, IDEOGRAM.inputs(i)) for i in range(4)]
    folder = record(pipe, items, tmp_path / "r", taps=[tap], batch_size=2, **IDEOGRAM.settings)
    header = Recording(folder).header
    assert (header.num_branches, header.expert_steps) == (2, [0])
    predictor = fit_rows(Recording(folder), ANCHORS, tap)
    save_predictor(predictor, predictor.spec, tmp_path / "p")
    full = call(IDEOGRAM, pipe, (7, 8))
    with forecasting(pipe, load_predictor(tmp_path / "p")) as attached:
        error = (call(IDEOGRAM, pipe, (7, 8)) - full).norm() / full.norm()
        assert attached.report().anchors == [*ANCHORS] and 0 < error < 0.5
        pipe.unconditional_transformer.layers[0].feed_forward.w1.weight.data.mul_(1.5)
        with pytest.raises(PredictorMismatch, match="weights"):
            call(IDEOGRAM, pipe, (7, 8))


def test_field_networks_inspect_names_both():
    lines, supported = inspected(IDEOGRAM.build(), Item(0, 0, {"prompt": "1"}), IDEOGRAM.settings)
    text = "\n".join(lines)
    assert supported and "unconditional_transformer Ideogram4Transformer2DModel" in text
    assert "a branch for each network of a step" in text


def test_field_networks_one_left_out_of_a_step_is_not_taken_for_the_other():
    pipe = IDEOGRAM.build()
    networks = [pipe.transformer, pipe.unconditional_transformer]
    scheduler, x = pipe.scheduler, noise(0, 4, 16)
    given = {
        "encoder_hidden_states": noise(1, 4, 12),
        "position_ids": torch.stack([torch.arange(4)] * 3, -1)[None],
        "segment_ids": torch.ones(1, 4, dtype=torch.long),
        "indicator": torch.full((1, 4), 2),
        "return_dict": False,
    }

    def output(place, time):
        return networks[place](hidden_states=x, timestep=time.expand(1) / 1000, **given)[0]

    with torch.no_grad():
        scheduler.set_timesteps(3)
        own = output(1, scheduler.timesteps[0])
        with forecasting(pipe, Reuse(), (0,), "output"):
            scheduler.set_timesteps(3)
            for places, time in zip([[0, 1], [0, 1], [1]], scheduler.timesteps, strict=True):
                outputs = [output(place, time) for place in places]
                scheduler.step(outputs[0], time, x)
    assert torch.equal(outputs[-1], own)


def test_field_networks_the_same_module_under_both_names_is_one_network():
    pipe = IDEOGRAM.build()
    pipe.unconditional_transformer = pipe.transformer
    assert list(transformers_of(pipe)) == ["transformer"] and not others_of(pipe)
    calls = counted(pipe, "transformer")
    with forecasting(pipe, Taylor(1), ANCHORS) as attached:
        call(IDEOGRAM, pipe, (0,))
    assert calls == {"transformer": 6}
    assert "calls of the network: 6 computed, 10 forecast" in str(attached.report())


@pytest.mark.parametrize("compiled", [False, True])
def test_field_networks_a_controlnet_is_counted_as_never_forecast(compiled):
    family = MORE["flux_controlnet"]
    pipe = family.build()
    plain, before = call(family, pipe), footprint(pipe)
    if compiled:
        pipe.controlnet.compile(backend="eager", fullgraph=True)
    with forecasting(pipe, Taylor(1), ANCHORS) as attached:
        call(family, pipe)
    assert attached.report().others == {"controlnet": 8}
    assert "never forecast: 8 calls of controlnet" in str(attached.report())
    if not compiled:
        assert torch.equal(call(family, pipe), plain) and footprint(pipe) == before


def test_field_networks_a_further_transformer_is_counted_by_the_name_it_has():
    pipe = tiny("flux")
    pipe.refiner = tiny_flux()

    def refine(pipe, index, timestep, given):
        tokens = given["latents"]
        pipe.refiner(
            tokens,
            encoder_hidden_states=noise(0, 3, 12).expand(len(tokens), -1, -1),
            pooled_projections=noise(0, 12).expand(len(tokens), -1),
            timestep=timestep.expand(len(tokens)) / 1000,
            img_ids=torch.zeros(tokens.shape[1], 3),
            txt_ids=torch.zeros(3, 3),
        )
        return given

    with forecasting(pipe, Taylor(1), ANCHORS) as attached:
        run("flux", pipe, callback_on_step_end=refine)
        assert attached.report().others == {"refiner": 7}  # the last callback is after the run
        run("flux", pipe)
        assert not attached.report().others
    assert "forward" not in vars(pipe.refiner)


def test_field_networks_what_takes_no_time_is_no_denoiser():
    pipe = tiny("flux")
    bare = SimpleNamespace(transformer=pipe.transformer, vae=torch.nn.Linear(2, 2))
    assert not others_of(bare) and not others_of(MORE["flux_img2img"].build())
