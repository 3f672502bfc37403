"""Pipelines that start from a picture are recorded by the very call a person makes."""

import functools
import io

import numpy as np
import pytest
import torch
from families import MORE
from families.family import final, prompt, seeded
from families.images import flux_prompt
from field_pipelines import kontext, wan_from_picture, wan_vace
from PIL import Image
from tiny_hosts import items, pipeline, settings
from tiny_pipelines import tiny_pipeline

from foreseer.evaluation.generate import draw
from foreseer.evaluation.measure import item_of
from foreseer.trajectories import recipe
from foreseer.trajectories.files.header import RecordingError
from foreseer.trajectories.inspect_pipeline import inspected
from foreseer.trajectories.prompts import CONTENT, Item, digest
from foreseer.trajectories.recorder import record
from foreseer.trajectories.recording import Recording

pytestmark = pytest.mark.fault
SMALL = {"height": 32, "width": 32, "num_inference_steps": 4}


def picture(shade: int = 30, mode: str = "RGB") -> Image.Image:
    return Image.new("RGB", (32, 32), (200, 120, shade)).convert(mode)


FROM_PICTURES = {
    "kontext": (kontext, flux_prompt(0), {**SMALL, "_auto_resize": False, "image": picture()}),
    "wan": (wan_from_picture, {**prompt(0, 6, 12), "image": picture()}, {**SMALL, "num_frames": 5}),
    "vace": (wan_vace, prompt(0, 6, 12), {**SMALL, "num_frames": 5}),
    "vace_reference": (
        wan_vace,
        prompt(0, 6, 12) | {"reference_images": [picture()]},
        {**SMALL, "num_frames": 5},
    ),
    "img2img": (
        MORE["flux_img2img"].build,
        flux_prompt(0) | {"image": picture()},
        {**SMALL, "strength": 0.75},
    ),
}


@pytest.mark.parametrize("name", FROM_PICTURES)
def test_field_pictures_are_recorded_as_the_call_that_is_made(name, tmp_path):
    build, inputs, given = FROM_PICTURES[name]
    pipe = build()
    plain = final(pipe(**inputs, **given, generator=seeded(3), output_type="latent"))
    record(pipe, [Item(0, 3, inputs)], tmp_path / "r", taps=["output"], batch_size=1, **given)
    assert torch.equal(Recording(tmp_path / "r").load(0)["final"], plain[0])


@pytest.mark.parametrize("name", ["wan", "vace"])
def test_field_pictures_do_not_keep_inspect_from_one_sample(name):
    build, inputs, given = FROM_PICTURES[name]
    lines, supported = inspected(build(), Item(0, 3, inputs), given)
    assert supported, lines


def test_field_pictures_of_several_items_are_a_list(tmp_path):
    pipe = MORE["flux_img2img"].build()
    both = [Item(i, i, flux_prompt(i) | {"image": picture(40 * i)}) for i in range(2)]
    given = {**SMALL, "strength": 0.75}
    for size in (1, 2):
        record(pipe, both, tmp_path / str(size), taps=["output"], batch_size=size, **given)
    alone, together = (Recording(tmp_path / str(size)).stack("final") for size in (1, 2))
    torch.testing.assert_close(together, alone)  # other batches round differently
    assert not torch.allclose(alone[0], alone[1])


def test_field_pictures_another_one_in_the_settings_is_another_recipe(tmp_path):
    build, inputs, given = FROM_PICTURES["kontext"]
    again = functools.partial(
        record, build(), [Item(0, 3, inputs)], tmp_path / "r", taps=["output"], batch_size=1
    )
    again(**given)
    saved = io.BytesIO()
    picture().save(saved, "PNG")
    again(**{**given, "image": Image.open(saved)})  # the same, from a file
    with pytest.raises(RecordingError, match="settings_digest is"):
        again(**{**given, "image": picture(31)})


@pytest.mark.parametrize("what", ["image", "prompt_embeds"])
def test_field_pictures_another_one_of_an_item_is_another_item(what, tmp_path):
    build, inputs, given = FROM_PICTURES["wan"]
    again = functools.partial(
        record, build(), out=tmp_path / "r", taps=["output"], batch_size=1, **given
    )
    again(items=[Item(0, 3, inputs)])
    again(items=[Item(0, 3, dict(inputs))])
    other = picture(31) if what == "image" else inputs["prompt_embeds"] + 1
    with pytest.raises(RecordingError, match="holds item 0 as .*inputs_sha256"):
        again(items=[Item(0, 3, {**inputs, what: other})])


def test_field_pictures_recordings_without_a_digest_are_resumed(tmp_path, monkeypatch):
    pipe, plain = pipeline("flux"), recipe.item_meta
    again = functools.partial(record, pipe, taps=["output"], batch_size=2, **settings("flux"))
    with monkeypatch.context() as earlier:
        earlier.setattr(
            "foreseer.trajectories.recorder.item_meta",
            lambda item: {k: v for k, v in plain(item).items() if k != CONTENT},
        )
        again(items("flux", 2), out=tmp_path / "r")
    again(items("flux", 4), out=tmp_path / "r")
    recording = Recording(tmp_path / "r")
    assert [CONTENT in recording.meta(item) for item in range(4)] == [False, False, True, True]
    assert item_of(recording, 3).inputs.keys() == items("flux", 4)[3].inputs.keys()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (picture(), picture(31)),
        (picture(), picture(mode="L")),
        (picture(mode="P"), picture(31, "P")),
        (np.zeros((2, 3)), np.zeros((3, 2))),
        (np.zeros(2, "float32"), np.zeros(2, "int32")),
        ([picture(), picture()], [picture(), picture(31)]),
        ({"image": picture(), "scale": 1}, {"image": picture(), "scale": 2}),
        ({"embeds": torch.zeros(2)}, {"embeds": torch.ones(2)}),
        ([[picture()], [picture(31)]], [[picture(), picture(31)], []]),
    ],
)
def test_field_pictures_are_told_apart_by_their_content(one, other):
    assert digest([], {"x": one}) == digest([], {"x": one}) != digest([], {"x": other})
    assert digest([], {"x": one}) != digest([], {"y": one})


@pytest.mark.parametrize("value", [print, object(), np.array([print]), {"a": [print]}])
def test_field_pictures_what_has_no_content_is_refused_in_words(value, tmp_path):
    with pytest.raises(ValueError, match="the argument callback is or holds a .*expected numbers"):
        record(pipeline("dit"), items("dit"), tmp_path / "r", callback=value)
    assert not (tmp_path / "r").exists()


def test_field_pictures_one_label_is_still_a_list_of_one():
    pipe, called = tiny_pipeline(), []
    pipe._check_labels = lambda labels: called.append(labels) or labels
    draw(pipe, [{"class_labels": 2}], 0, num_inference_steps=1)
    assert called == [[2]]
