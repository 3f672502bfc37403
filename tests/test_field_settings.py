"""Whatever a pipeline call sets that changes the function is recorded, stored and compared."""

import dataclasses
import functools
import json
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from families import FAMILIES, MORE, Family, call
from test_composition_weights import lora
from test_hosts import fitted

from foreseer.checkpoints.format import CheckpointError, load_predictor
from foreseer.checkpoints.spec import PredictorMismatch, first_difference
from foreseer.integration.forecasting import forecasting
from foreseer.trajectories.files.header import RecordingError
from foreseer.trajectories.prompts import Item
from foreseer.trajectories.recorder import record
from foreseer.trajectories.recording import Recording

pytestmark = pytest.mark.fault
ANCHORS = (0, 1, 2, 5)
ALL = FAMILIES | MORE


def recorded(family: Family, pipe: Any, folder: Any, **changes: Any) -> Recording:
    found = [Item(i, 10 + i, family.inputs(i)) for i in range(4)]
    settings = family.settings | changes
    record(pipe, found, folder, taps=["output"], states=False, batch_size=2, **settings)
    return Recording(folder)


def learned(family: Family, pipe: Any, folder: Any, **changes: Any) -> Any:
    """A predictor fitted on a recording and read from its file."""
    return fitted(recorded(family, pipe, folder / "r", **changes), "output", ANCHORS, folder / "p")


def with_lora() -> Any:
    pipe = FAMILIES["flux"].build()
    lora(pipe)
    return pipe


class PictureIPAdapterAttnProcessor(FluxIPAdapterAttnProcessor):
    """One that is given its picture when it is made."""

    def __call__(self, attn: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        width = hidden_states.shape[-1]
        picture = torch.linspace(-1, 1, 2 * width).view(1, 2, width)
        kwargs["ip_hidden_states"] = [picture.expand(len(hidden_states), -1, -1)]
        return super().__call__(attn, hidden_states, *args, **kwargs)


def with_ip_adapter(scale: float = 0.6) -> Any:
    """A FLUX transformer whose attention has the processors of an IP-adapter."""
    pipe = FAMILIES["flux"].build()
    for block in pipe.transformer.transformer_blocks:
        torch.manual_seed(0)
        width = block.attn.inner_dim
        processor = PictureIPAdapterAttnProcessor(width, width, (2,), [scale])
        block.attn.processor = processor
    return pipe


def set_scale(pipe: Any, scale: float) -> None:
    for block in pipe.transformer.transformer_blocks:
        block.attn.processor.scale = [scale]


CALLS = {
    "LoRA scale": ("flux", with_lora, {"joint_attention_kwargs": {"scale": 0.3}}),
    "ControlNet scale": ("flux_controlnet", None, {"controlnet_conditioning_scale": 0.9}),
    "ControlNet window": ("flux_controlnet", None, {"control_guidance_end": 0.5}),
    "guidance rescale": ("ltx", None, {"guidance_rescale": 0.7}),
    "skipped layers' scale": ("ltx", None, {"attention_kwargs": {"scale": 0.5}}),
}


@pytest.mark.parametrize("name", CALLS)
def test_field_settings_of_the_call_are_compared_with_those_of_the_fit(name, tmp_path):
    slot, build, other = CALLS[name]
    family = ALL[slot]
    pipe = (build or family.build)()
    plain = call(family, pipe, seeds=(0,))
    predictor = learned(family, pipe, tmp_path)
    with forecasting(pipe, predictor):
        expected = call(family, pipe, seeds=(0,))
        with pytest.raises(PredictorMismatch, match=rf"fitted at {next(iter(other))}.*this run"):
            call(family, pipe, seeds=(0,), **other)
        assert torch.equal(call(family, pipe, seeds=(0,)), expected)
    assert torch.equal(call(family, pipe, seeds=(0,)), plain)
    serving = learned(family, pipe, tmp_path / "other", **other)
    with forecasting(pipe, serving):
        call(family, pipe, seeds=(0,), **other)
        with pytest.raises(PredictorMismatch, match=rf"fitted at {next(iter(other))}"):
            call(family, pipe, seeds=(0,))


def test_field_settings_of_an_ip_adapter_are_compared(tmp_path):
    family, pipe = FAMILIES["flux"], with_ip_adapter()
    predictor = learned(family, pipe, tmp_path)
    assert predictor.spec.guidance["ip_adapter_scale[0]"] == 0.6
    with forecasting(pipe, predictor):
        call(family, pipe)
        set_scale(pipe, 0.2)
        with pytest.raises(PredictorMismatch, match=r"ip_adapter_scale\[0\] 0.6, this run has 0.2"):
            call(family, pipe)
        set_scale(pipe, 0.6)
        pipe.transformer.transformer_blocks[0].attn.processor.scale = [0.0]
        with pytest.raises(PredictorMismatch, match="ip_adapter_scale"):
            call(family, pipe)


def at_step(index: int, change: Any, pipe: Any, step: int, timestep: Any, kwargs: Any) -> Any:
    if step == index:
        change(pipe)
    return kwargs


MID_RUN = {
    "guidance": ("sd3", None, lambda pipe: setattr(pipe, "_guidance_scale", 12.0)),
    "LoRA": ("flux", with_lora, lambda pipe: pipe.set_adapters("style", 0.3)),
    "LoRA scale": (
        "flux",
        with_lora,
        lambda pipe: setattr(pipe, "_joint_attention_kwargs", {"scale": 0.3}),
    ),
    "IP-adapter": ("flux", with_ip_adapter, functools.partial(set_scale, scale=0.1)),
}


@pytest.mark.parametrize("name", MID_RUN)
def test_field_settings_changed_in_mid_run_are_compared_at_every_step(name, tmp_path):
    slot, build, change = MID_RUN[name]
    family = FAMILIES[slot]
    pipe = (build or family.build)()
    predictor = learned(family, pipe, tmp_path)
    with forecasting(pipe, predictor):
        call(family, pipe)
        with pytest.raises(PredictorMismatch, match="fitted at .*, this run has .* at step 3"):
            call(family, pipe, callback_on_step_end=functools.partial(at_step, 2, change))


def test_field_settings_that_a_pipeline_changes_itself_are_recorded_step_by_step(tmp_path):
    family = FAMILIES["cogvideox"]
    pipe = family.build()
    predictor = learned(family, pipe, tmp_path, use_dynamic_cfg=True)
    scales = predictor.spec.guidance["guidance_scale"]
    assert len(scales) == 8 and len(set(scales)) > 4
    with forecasting(pipe, predictor):
        call(family, pipe, use_dynamic_cfg=True)
        with pytest.raises(PredictorMismatch, match="fitted at guidance_scale"):
            call(family, pipe, use_dynamic_cfg=True, guidance_scale=3.0)
        with pytest.raises(PredictorMismatch, match="fitted at guidance_scale .* at step 0"):
            call(family, pipe, use_dynamic_cfg=False)


def test_field_settings_that_no_file_told_of_are_accepted_as_before(tmp_path):
    family, pipe = FAMILIES["flux"], with_lora()
    predictor = learned(family, pipe, tmp_path)
    path = tmp_path / "p" / "config.json"
    old = json.loads(path.read_text())
    old["schema_version"], old["spec"]["guidance"] = 2, {}
    path.write_text(json.dumps(old))
    earlier = load_predictor(tmp_path / "p")
    assert earlier.spec == dataclasses.replace(predictor.spec, guidance={})
    with forecasting(pipe, earlier):
        found = call(family, pipe, joint_attention_kwargs={"scale": 0.3})
        assert found.isfinite().all()
        with pytest.raises(PredictorMismatch, match="guidance_scale"):
            call(family, pipe, guidance_scale=9.0)


def test_field_settings_must_stay_in_a_recording(tmp_path):
    family, pipe = FAMILIES["flux"], with_ip_adapter()
    recorded(family, pipe, tmp_path)
    set_scale(pipe, 0.1)
    more = [Item(i, 10 + i, family.inputs(i)) for i in range(6)]
    with pytest.raises(RecordingError, match="ip_adapter_scale"):
        record(
            pipe,
            more,
            tmp_path,
            taps=["output"],
            states=False,
            batch_size=2,
            **family.settings,
        )


def test_field_settings_of_as_many_values_as_steps_are_read_and_others_refused(tmp_path):
    family, pipe = FAMILIES["flux"], FAMILIES["flux"].build()
    learned(family, pipe, tmp_path)
    path = tmp_path / "p" / "config.json"
    values = json.loads(path.read_text())
    values["spec"]["guidance"]["guidance_scale"] = [1.0, 2.0]
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="guidance has 2 values of guidance_scale"):
        load_predictor(tmp_path / "p")


@pytest.mark.parametrize(
    ("one", "other", "index", "found"),
    [
        ({}, {"a": 1.0}, None, None),
        ({"a": None}, {"a[0]": 7.0}, None, "a"),
        ({"a[0]": 7.0}, {"a": None}, 0, "a"),
        ({"a": 1.0}, {"a": (1.0, 1.0)}, None, None),
        ({"a": (1.0, 2.0)}, {"a": 1.0}, 0, None),
        ({"a": (1.0, 2.0)}, {"a": 1.0}, 1, "a"),
        ({"a": (1.0, 2.0)}, {"a": 1.0}, 2, "a"),
        ({"a": (1.0, 2.0)}, {"a": (1.0, 2.0, 3.0)}, None, "a"),
        ({"a": 1e9}, {"a": 1e9 + 1}, None, None),
        ({"a[0]": 1.0}, {"a[0]": 1.0, "a[1]": 2.0}, None, "a[1]"),
    ],
)
def test_field_settings_are_equal_where_both_sides_tell_of_them(one, other, index, found):
    differing = first_difference(one, other, index)
    assert (differing is None) == (found is None)
    assert differing is None or differing.startswith(found)
    assert (first_difference(other, one, index) is None) == (found is None)


def test_field_settings_are_those_a_reader_of_a_recording_sees(tmp_path):
    family = ALL["flux_controlnet"]
    header = recorded(family, family.build(), tmp_path).header
    assert header.guidance["controlnet_conditioning_scale"] == 0.7
    assert header.guidance["joint_attention_kwargs[scale]"] == 1.0
    assert header.guidance["lora_scale"] is None and header.guidance["ip_adapter_scale"] is None
