"""Recordings of prompt embeddings hold them: runs are repeated, resumed, merged and fitted."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_hosts import items, pipeline, prompt, settings

import foreseer as fs
from foreseer.evaluation.measure import References, item_of
from foreseer.trajectories import prompts as kept_inputs
from foreseer.trajectories.files.repair import merge
from foreseer.trajectories.files.writer import RecordingWriter
from foreseer.trajectories.prompts import Item, can_repeat, generate_batch
from foreseer.trajectories.recipe import item_meta

STEPS = 6
SETTINGS = settings("flux", STEPS)


def recorded(out: Path, asked: list[Item], **options: Any) -> fs.Recording:
    return fs.record(pipeline("flux"), asked, str(out), batch_size=2, **options, **SETTINGS)


@pytest.fixture(scope="module")
def recording(tmp_path_factory) -> fs.Recording:
    return recorded(tmp_path_factory.mktemp("kept") / "r", items("flux", 8))


def test_a_run_is_repeated_from_what_the_recording_holds(recording):
    for item in items("flux", 8):
        found = item_of(recording, item.index)
        assert (found.index, found.seed) == (item.index, item.seed)
        assert all(torch.equal(found.inputs[name], v) for name, v in item.inputs.items())
    references = References(recording, [0, 1], batch_size=2)
    pipe = pipeline("flux")
    for batch in references.batches:
        again = generate_batch(pipe, batch, output_type="latent", **references.settings)[0]
        assert torch.equal(again, references.finals)


def test_the_default_fit_runs_the_pipeline_on_recorded_embeddings(recording):
    predictor = fs.fit(recording, anchors=[0, 3], pipeline=pipeline("flux"), rank=2)
    assert isinstance(predictor, fs.predictors.Readout)


def test_a_file_of_embeddings_needs_not_be_there_any_more(tmp_path):
    rows = [prompt(10 * i) for i in range(3)]
    tensors = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    save_file(tensors, tmp_path / "p.safetensors")
    made = fs.record(
        pipeline("flux"), str(tmp_path / "p.safetensors"), str(tmp_path / "r"), **SETTINGS
    )
    (tmp_path / "p.safetensors").unlink()
    assert can_repeat(made) and torch.equal(
        item_of(made, 2).inputs["prompt_embeds"], rows[2]["prompt_embeds"]
    )


def test_merged_recordings_hold_the_embeddings_of_both(recording, tmp_path):
    more = [Item(8 + i, 50 + i, dict(prompt(7 * i))) for i in range(2)]
    other = recorded(tmp_path / "b", more)
    merge(tmp_path / "all", [recording.folder, other.folder])
    both = fs.Recording(tmp_path / "all")
    assert len(both) == 10 and can_repeat(both)
    assert torch.equal(item_of(both, 9).inputs["prompt_embeds"], more[1].inputs["prompt_embeds"])


def test_changed_embeddings_are_another_recording(recording):
    changed = items("flux", 8)
    changed[3].inputs["prompt_embeds"] = changed[3].inputs["prompt_embeds"] + 1
    with pytest.raises(fs.RecordingError, match="holds item 3 as .*inputs_sha256"):
        recorded(Path(recording.folder), changed)


@pytest.mark.parametrize("kind", ["too large", "a picture", "not finite", "a list"])
def test_what_is_kept_is_all_or_nothing(kind, monkeypatch):
    inputs: dict[str, Any] = {"prompt_embeds": torch.ones(1, 2, 3), "words": "a"}
    if kind == "too large":
        monkeypatch.setattr(kept_inputs, "MAX_BYTES", 23)
    elif kind == "a picture":
        inputs["image"] = Image.new("L", (2, 2))
    elif kind == "not finite":
        inputs["mask"] = torch.tensor([-torch.inf])
    else:
        inputs["prompt_embeds"] = [torch.ones(2, 3)]
    found = kept_inputs.kept_inputs(Item(0, 0, inputs))
    assert list(found) == (["input/prompt_embeds/0"] if kind == "a list" else [])


def test_a_recording_with_digests_alone_is_refused_by_fits_that_run(tmp_path, monkeypatch):
    monkeypatch.setattr(kept_inputs, "MAX_BYTES", 0)
    made = recorded(tmp_path / "r", items("flux", 4))
    assert not can_repeat(made)
    with pytest.raises(ValueError, match="item 3 .* only a digest is stored"):
        item_of(made, 3)
    with pytest.raises(ValueError, match="of pictures or large tensors"):
        fs.fit(made, 3, method="closed_loop")


def test_a_list_of_embeddings_comes_back_as_a_list(tmp_path, recording):
    inputs = {"prompt_embeds": [torch.ones(2, 3)], "guess": 0.5}
    item = Item(0, 1, inputs)
    with RecordingWriter(tmp_path / "r", recording.header) as writer:
        stored = {"final": torch.zeros(1)} | kept_inputs.kept_inputs(item)
        writer.write(0, stored, item_meta(item))
    found = item_of(fs.Recording(tmp_path / "r"), 0).inputs
    assert found["guess"] == 0.5 and torch.equal(found["prompt_embeds"][0], torch.ones(2, 3))
