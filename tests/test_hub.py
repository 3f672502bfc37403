"""Predictors and recordings come back from the hub as they were pushed, with pages that answer.

The client is huggingface_hub's own; the hub is tests/hub_stand_in.py on this machine, which keeps
what was sent. The real hub was not reachable.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoint_cases import random_predictor, spec_for
from hub_stand_in import serving, sha
from huggingface_hub import DatasetCard, ModelCard
from recording_cases import record
from test_refit import made

import foreseer as fs
from foreseer.evaluation.results import BenchMeta, BenchRow, save_meta, save_rows
from foreseer.trajectories.recording import Recording

NAME, BASE = "owner/flux-8", "black-forest-labs/FLUX.1-dev"
REPO, DATA = f"models/{NAME}", "datasets/owner/run"
PNG = b"\x89PNG picture"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setenv("FORESEER_CACHE", str(tmp_path / "shards"))
    with serving(monkeypatch, tmp_path / "hub_cache") as hub:
        yield hub


def saved(folder: Path, seed: int = 0, **changes: Any) -> Any:
    """A predictor, with its spec, and its file."""
    predictor = random_predictor(seed=seed)
    host = {"class": "FluxTransformer2DModel", "parameters": 11_900_000_000, "base_model": BASE}
    given = {"host": host, "latent_shapes": ((4096, 64),), **changes}
    predictor.spec = spec_for(predictor, **given)
    fs.save(predictor, str(folder))
    return predictor


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


# -------------------------------------------------------------------------------------- predictors


def test_a_pushed_predictor_comes_back_by_name_and_by_revision(hub, tmp_path):
    first, folder = saved(tmp_path / "p"), tmp_path / "p"
    before = contents(folder)
    assert fs.push(str(folder), NAME) == f"https://huggingface.co/{NAME}/commit/{sha(1)}"
    assert hub.files(REPO) == before == contents(folder)
    second = saved(folder, seed=1)
    fs.push(str(folder), NAME)
    assert torch.equal(fs.load(NAME).weight, second.weight)
    old = fs.load(NAME, revision=sha(1))
    assert torch.equal(old.weight, first.weight) and not torch.equal(old.weight, second.weight)
    assert old.spec == first.spec and not hub.private and not hub.collections


def test_a_page_answers_what_is_asked_first_and_shows_pictures(hub, tmp_path):
    saved(tmp_path / "p")
    (tmp_path / "p" / "sheet.png").write_bytes(PNG)
    (tmp_path / "p" / ".notes").write_text("mine")
    fs.push(str(tmp_path / "p"), NAME, private=True, licence="other")
    files = hub.files(REPO)
    assert sorted(files) == ["README.md", "config.json", "model.safetensors", "sheet.png"]
    assert files["sheet.png"] == PNG and hub.private == {REPO}
    card = files["README.md"].decode()
    assert f"| For which model | [{BASE}](https://huggingface.co/{BASE}), " in card
    assert "`FluxTransformer2DModel`, 11,900,000,000 parameters |" in card
    settings = "8 steps of FlowMatchEulerDiscreteScheduler, guidance_scale 3, float32"
    assert f"| At which settings | {settings}, latents 4096x64 |" in card
    fast = "4 of 8 network evaluations, 2.0 x fewer; seconds not measured"
    assert f"| How much faster | {fast} |" in card
    far = "PSNR of the samples against the full run, dB (higher is better): 31.5"
    assert f"| How far from the full run | at 4 evaluations {far} |" in card
    assert "![sheet.png](sheet.png)" in card
    data = ModelCard(card).data
    head = data.to_dict()
    told = {"license": "other", "base_model": BASE, "library_name": "foreseer"}
    assert told.items() <= head.items()
    assert [each.metric_value for each in data.eval_results] == [31.5]
    assert "apache" in (tmp_path / "p" / "README.md").read_text()  # the folder is as it was


def test_predictors_of_a_base_model_are_collected_where_asked(hub, tmp_path):
    for seed, name in enumerate([NAME, "owner/flux-6", NAME]):
        saved(tmp_path / "p", seed)
        fs.push(str(tmp_path / "p"), name, collection=True)
    (collection,) = hub.collections.values()
    assert collection["title"] == f"foreseer: {BASE}" and collection["namespace"] == "owner"
    assert [each["id"] for each in collection["items"]] == [NAME, "owner/flux-6"]


def test_what_keeps_a_predictor_out_of_a_collection_is_said(hub, tmp_path):
    saved(tmp_path / "p", host={"class": "FluxTransformer2DModel"})
    with pytest.raises(fs.CheckpointError, match="not say which hub model.*Nothing was uploaded"):
        fs.push(str(tmp_path / "p"), NAME, collection=True)
    assert not hub.repos
    saved(tmp_path / "p")
    hub.refuse = ("/api/collections",)
    words = f"{NAME} is uploaded, but could not be put into the collection 'foreseer: {BASE}'"
    with pytest.raises(fs.CheckpointError, match=words):
        fs.push(str(tmp_path / "p"), NAME, collection=True)
    assert "model.safetensors" in hub.files(REPO)
    hub.refuse = ("/api/repos",)
    with pytest.raises(fs.CheckpointError, match="could not upload to owner/other .*hf auth login"):
        fs.push(str(tmp_path / "p"), "owner/other")


def test_several_budgets_are_one_page(hub, tmp_path):
    predictors = {}
    for anchors in ((0, 1, 4), (0, 1, 3, 6)):
        predictor = random_predictor(anchors=anchors)
        predictor.spec = spec_for(predictor, host={"class": "Tiny", "base_model": BASE})
        predictors[len(anchors)] = predictor
    fs.save(predictors, str(tmp_path / "several"))
    (tmp_path / "several" / "3" / "sheet.png").write_bytes(PNG)
    fs.push(str(tmp_path / "several"), NAME, collection=True)
    files = hub.files(REPO)
    parts = ("README.md", "config.json", "model.safetensors")
    expected = {"README.md", "budgets.json", "3/sheet.png"}
    assert set(files) == expected | {f"{n}/{part}" for n in (3, 4) for part in parts}
    card = files["README.md"].decode()
    assert "| 3 of 8 network evaluations, 2.7 x fewer; 4 of 8 network" in card
    assert "![3/sheet.png](3/sheet.png)" in card
    assert "![sheet.png](sheet.png)" in files["3/README.md"].decode()
    data = ModelCard(card).data
    assert data.base_model == BASE and len(data.eval_results) == 2
    assert torch.equal(fs.load(NAME, evaluations=3).weight, predictors[3].weight)


# -------------------------------------------------------------------------------------- benchmarks


def row(method: str, kind: str, tap: str, anchors: str, seconds: float) -> BenchRow:
    values: dict[str, Any] = dict.fromkeys(BenchRow.__dataclass_fields__, 0.5)
    values |= {"method": method, "kind": kind, "tap": tap, "anchors": anchors, "psnr_db": 30.25}
    values |= {"anchors_name": "given", "num_anchors": len(anchors.split()), "num_samples": 16}
    values |= {"guidance_scale": 3.0, "seconds_per_image": seconds}
    values |= dict.fromkeys(("state_bytes", "num_trajectories", "fit_seconds", "rival", "wins"))
    return BenchRow(**values)


def benched(folder: Path, *rows: BenchRow) -> str:
    folder.mkdir()
    full = row("full", "full", "none", "0 1 2 3 4 5 6 7", 8.0)
    save_rows(
        [full, row("euler", "solver", "none", "0 2 4 6", 4.0), *rows], folder / "results.json"
    )
    meta = BenchMeta({}, [0], "a fast GPU", "foreseer bench", "2026-01-01", "abc")
    save_meta(meta, folder / "results.json")
    (folder / "contact_sheet.png").write_bytes(PNG)
    return str(folder)


def test_a_benchmark_answers_on_the_page(hub, tmp_path):
    saved(tmp_path / "p")
    bench = benched(tmp_path / "bench", row("mine", "learned", "output", "0 1 3 6", 3.2))
    fs.push(str(tmp_path / "p"), NAME, bench=bench)
    files = hub.files(REPO)
    card = files["README.md"].decode()
    fast = "4 of 8 network evaluations, 2.0 x fewer, 2.5 x faster on the machine below"
    assert f"| How much faster | {fast} |" in card and "On a fast GPU." in card
    assert "| How far from the full run | PSNR 30.25 dB (0.50 to 0.50), SSIM 0.5000, 16 " in card
    assert "| euler | 4 | 30.25 |" in card and "| mine | 4 | 30.25 |" in card
    assert files["contact_sheet.png"] == PNG and "![contact_sheet.png](contact_sheet.png)" in card
    found = [(each.metric_type, each.metric_value) for each in ModelCard(card).data.eval_results]
    assert found == [("psnr_db", 31.5), ("psnr_db", 30.25), ("ssim", 0.5)]


def test_a_benchmark_of_others_is_refused_before_anything_is_sent(hub, tmp_path):
    saved(tmp_path / "p")
    other = benched(tmp_path / "bench", row("other", "learned", "hidden", "0 1 3 6", 3.2))
    with pytest.raises(fs.CheckpointError, match="0 rows of this predictor .*; it has other: hid"):
        fs.push(str(tmp_path / "p"), NAME, bench=other)
    with pytest.raises(
        ValueError, match=r"has no results.json; expected the folder of a `foreseer"
    ):
        fs.push(str(tmp_path / "p"), NAME, bench=str(tmp_path))
    assert not hub.repos


# -------------------------------------------------------------------------------------- recordings


def test_a_recording_is_a_data_set_that_is_read_where_it_lies(hub, tmp_path):
    record(tmp_path / "run", [0, 1])
    record(tmp_path / "run", [2], rank=1)
    fs.push(str(tmp_path / "run"), "owner/run", private=True)
    files, local = hub.files(DATA), contents(tmp_path / "run")
    assert files.keys() - local.keys() == {"README.md"} and hub.private == {DATA}
    assert {name: files[name] for name in files if name != "README.md"} == {
        name: content for name, content in local.items() if name in files
    }
    assert {"recording.json", "manifest.00000.jsonl", "manifest.00001.jsonl"} <= set(files)
    found, own = Recording("hf://datasets/owner/run"), Recording(tmp_path / "run")
    assert found.header == own.header and found.items == [0, 1, 2] and found.verify() == []
    for item in own.items:
        expected = own.load(item)
        assert all(torch.equal(value, expected[n]) for n, value in found.load(item).items())
        assert found.meta(item) == own.meta(item)


def test_the_card_of_a_recording_says_what_it_is(hub, tmp_path):
    record(tmp_path / "run", [0, 1])
    fs.push(str(tmp_path / "run"), "owner/run")
    card = DatasetCard(hub.files(DATA)["README.md"].decode())
    assert card.data.license is None and "foreseer" in card.data.tags
    assert card.data.configs == [{"config_name": "trajectories", "data_files": "manifest.*.jsonl"}]
    size = sum(entry.bytes for entry in Recording(tmp_path / "run").entries.values())
    for line in (
        "| transformer | TinyTransformer, ? parameters |",
        "| steps | 5 |",
        "| guidance_scale | 3.0 |",
        "| taps | output, blocks.1 |",
        "| trajectories | 2 |",
        f"| bytes of all shards | {size:,} |",
        'fs.fit("hf://datasets/owner/run", evaluations=8',
    ):
        assert line in card.text
    (tmp_path / "run" / "README.md").write_text("# Mine\n")
    fs.push(str(tmp_path / "run"), "owner/run", licence="cc-by-4.0")
    head, text = hub.files(DATA)["README.md"].decode().split("---\n")[1:]
    assert yaml.safe_load(head) == {"license": "cc-by-4.0"} and text.strip() == "# Mine"


def test_pushing_a_recording_again_adds_what_is_new_and_no_half_line(hub, tmp_path):
    record(tmp_path / "run", [0])
    fs.push(str(tmp_path / "run"), "owner/run")
    assert Recording("hf://datasets/owner/run").items == [0]
    record(tmp_path / "run", [1])
    with open(tmp_path / "run" / "manifest.00000.jsonl", "ab") as file:
        file.write(b'{"item": 2, "fi')  # a recorder at work
    fs.push(str(tmp_path / "run"), "owner/run")
    assert Recording("hf://datasets/owner/run").items == [0, 1]
    assert hub.files(DATA)["manifest.00000.jsonl"].endswith(b"}\n")
    assert Recording(f"hf://datasets/owner/run@{sha(1)}").items == [0]


def test_a_fit_takes_a_recording_from_the_hub(hub, tmp_path):
    folder = made(tmp_path / "run", 0, 8)
    fs.push(folder, "owner/run")
    options: Any = {"evaluations": 3, "method": "lstsq"}
    found = fs.fit("hf://datasets/owner/run", **options)
    assert torch.equal(found.weight, fs.fit(folder, **options).weight)


def test_a_recording_that_is_not_sound_or_not_there_is_refused_in_words(hub, tmp_path):
    record(tmp_path / "run", [0, 1])
    with pytest.raises(ValueError, match="is a recording: collection and bench are a predictor's"):
        fs.push(str(tmp_path / "run"), "owner/run", collection=True)
    hub.refuse = ("/api/repos",)
    with pytest.raises(fs.RecordingError, match="could not upload to owner/run"):
        fs.push(str(tmp_path / "run"), "owner/run")
    hub.refuse = ()
    shard = next((tmp_path / "run").rglob("*.safetensors"))
    shard.chmod(0o644)
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(
        fs.RecordingError, match="1 shards of .* are damaged .*nothing was uploaded"
    ):
        fs.push(str(tmp_path / "run"), "owner/run")
    assert not hub.repos
    with pytest.raises(fs.RecordingError, match="datasets/owner/nothing"):
        Recording("hf://datasets/owner/nothing")
    empty = json.loads((tmp_path / "run" / "recording.json").read_text())
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "recording.json").write_text(json.dumps(empty))
    with pytest.raises(fs.RecordingError, match="has no finished trajectory"):
        fs.push(str(tmp_path / "empty"), "owner/run")
