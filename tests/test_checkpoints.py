"""A predictor comes back from its checkpoint bit for bit, deploys alike, and its card tells all."""

import json
import subprocess
import sys
import tempfile

import huggingface_hub
import pytest
import torch
import yaml
from checkpoint_cases import random_predictor, spec_for, tiny_pipe
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from foreseer.checkpoints import hub, zoo
from foreseer.checkpoints.card import LOOP, model_card, verdict
from foreseer.checkpoints.config import SCHEMA_VERSION
from foreseer.checkpoints.format import CheckpointError, load_predictor, save_predictor
from foreseer.checkpoints.page import with_pictures
from foreseer.integration.forecasting import forecasting
from foreseer.integration.host.clock import flow_sigmas
from foreseer.integration.host.fingerprint import host_fingerprint
from foreseer.integration.host.module_host import host
from foreseer.predictors.linear import L2P
from foreseer.predictors.rules import Taylor

FILES = ["README.md", "config.json", "model.safetensors"]


@st.composite
def schedules(draw: st.DrawFn) -> tuple[int, list[int]]:
    num_steps = draw(st.integers(1, 12))
    later = draw(st.sets(st.integers(1, 11)))
    return num_steps, sorted({0, *(step for step in later if step < num_steps)})


@given(
    schedules(),
    st.integers(1, 3),
    st.lists(st.floats(-1e6, 1e6), max_size=12),
    st.floats(-10, 10),
    st.sampled_from(["output", "hidden", "residual"]),
)
@settings(max_examples=40)
def test_what_is_loaded_is_what_was_saved_bit_for_bit(
    schedule, num_branches, rows, guidance_scale, tap
):
    predictor = L2P(*schedule, num_branches)
    values = predictor.weight.view(-1)
    values[: len(rows)] = torch.tensor(rows, dtype=torch.float64)[: len(values)]
    spec = spec_for(predictor, guidance_scale=guidance_scale, tap=tap)
    with tempfile.TemporaryDirectory() as folder:
        loaded = load_predictor(save_predictor(predictor, spec, folder))
    assert type(loaded) is L2P
    assert loaded.spec == spec
    assert (loaded.num_steps, loaded.anchors, loaded.num_branches, loaded.window) == (
        predictor.num_steps,
        predictor.anchors,
        predictor.num_branches,
        predictor.window,
    )
    assert loaded.weight.dtype == torch.float64
    assert loaded.weight.numpy().tobytes() == predictor.weight.numpy().tobytes()


def test_equal_predictors_give_equal_files_and_nothing_else_is_left(tmp_path):
    predictor = random_predictor()
    for name in ("a", "b", "b"):  # the second time over the first
        save_predictor(predictor, spec_for(predictor), tmp_path / name)
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == FILES
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_files_hold_the_documented_keys(tmp_path):
    predictor = random_predictor()
    save_predictor(predictor, spec_for(predictor), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        "predictor.weight": (2, 8, 8),
        "golden.features": (4, 2, 2, 4),
        "golden.forecasts": (4, 2, 2, 4),
    }
    config = json.loads((tmp_path / "config.json").read_text())
    assert set(config) == {
        "schema_version",
        "predictor_class",
        "arguments",
        "spec",
        "versions",
        "model_sha256",
    }
    assert config["arguments"] == {
        "num_steps": 8,
        "anchors": [0, 1, 3, 6],
        "num_branches": 2,
        "expert_steps": [0],
        "partition": None,
        "first_time": None,
    }
    assert config["schema_version"] == SCHEMA_VERSION


def test_the_golden_forecasts_are_the_rows_applied_to_the_golden_features(tmp_path):
    predictor = random_predictor()
    save_predictor(predictor, spec_for(predictor), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    rows = predictor.weight[:, [2, 4, 5, 7]][:, :, [0, 1, 3, 6]]  # (B, F, K)
    expected = torch.einsum("bfk,kbnd->fbnd", rows, tensors["golden.features"].double())
    # the forecasts are float32 sums of four terms of size one
    assert (tensors["golden.forecasts"].double() - expected).abs().max() < 1e-5


@pytest.mark.parametrize("tap", ["output", "hidden"])
def test_a_loaded_predictor_deploys_bit_for_bit_like_the_one_in_memory(tmp_path, tap):
    pipe = tiny_pipe()
    pipe.scheduler.set_timesteps(8)
    predictor = random_predictor()
    predictor.spec = spec_for(
        predictor,
        tap=tap,
        sigmas=tuple(flow_sigmas(pipe.scheduler)),
        host=host_fingerprint(pipe.transformer),
    )
    save_predictor(predictor, predictor.spec, tmp_path)
    latents = {}
    for name, used in (("memory", predictor), ("loaded", load_predictor(tmp_path))):
        with forecasting(pipe, used) as run:
            generator = torch.Generator().manual_seed(1)
            call = pipe([0, 2], 3.0, 8, generator=generator, output_type="latent")
            latents[name] = call.images
        assert run.report().anchors == [0, 1, 3, 6]
    assert torch.equal(latents["memory"], latents["loaded"])
    full = pipe([0, 2], 3.0, 8, generator=torch.Generator().manual_seed(1), output_type="latent")
    assert not torch.equal(latents["loaded"], full.images)


def test_loading_imports_neither_lightning_nor_diffusers(tmp_path):
    predictor = random_predictor()
    save_predictor(predictor, spec_for(predictor), tmp_path)
    code = (
        "import sys; from foreseer.checkpoints.format import load_predictor; "
        f"print(load_predictor({str(tmp_path)!r}).spec.tap); "
        "print({'lightning', 'diffusers', 'transformers', 'huggingface_hub'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.stdout.split("\n")[:2] == ["output", "set()"], done.stderr


def test_an_analytic_predictor_needs_no_checkpoint_and_gets_none(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot save a Taylor; expected one of \[.*'L2P'"):
        save_predictor(Taylor(1), spec_for(random_predictor()), tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.fixture
def only_zoo(tmp_path, monkeypatch):
    """A folder that is all that is bundled, whether or not foreseer-zoo is installed."""
    monkeypatch.setattr(zoo, "ZOO", tmp_path / "zoo")
    monkeypatch.setattr(zoo, "APART_PACKAGE", "no_package_apart")
    return zoo.ZOO


def test_a_bundled_predictor_loads_by_name_and_nothing_outside_the_zoo_does(tmp_path, only_zoo):
    predictor = random_predictor()
    save_predictor(predictor, spec_for(predictor), only_zoo / "tiny")
    save_predictor(predictor, spec_for(predictor), tmp_path / "outside")
    assert torch.equal(load_predictor("zoo:tiny").weight, predictor.weight)
    for name in ("zoo:../outside", "zoo:none", "zoo:"):
        with pytest.raises(CheckpointError, match="bundled are zoo:tiny"):
            load_predictor(name)


@pytest.mark.usefixtures("only_zoo")
def test_a_missing_zoo_lists_nothing():
    with pytest.raises(FileNotFoundError, match="bundled are none"):
        zoo.resolve("zoo:tiny")


def test_a_hub_name_downloads_its_files_and_nothing_else(tmp_path, monkeypatch):
    predictor = random_predictor()
    save_predictor(predictor, spec_for(predictor), tmp_path)
    calls = []

    def snapshot_download(repo_id, revision, allow_patterns, dry_run=False):
        calls.append((repo_id, revision, sorted(allow_patterns)))
        return [] if dry_run else str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    loaded = load_predictor("owner/l2p-tiny", revision="v1")
    files = ["README.md", "budgets.json", *FILES[1:]]  # the second, where there are several
    assert calls == 2 * [("owner/l2p-tiny", "v1", files)]  # first the sizes
    assert torch.equal(loaded.weight, predictor.weight)


def test_a_folder_wins_over_a_hub_name(tmp_path, monkeypatch):
    predictor = random_predictor()
    save_predictor(predictor, spec_for(predictor), tmp_path / "runs" / "l2p")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "download", None)
    assert torch.equal(load_predictor("runs/l2p").weight, predictor.weight)


def test_a_card_tells_what_a_predictor_is_bound_to():
    predictor = random_predictor()
    spec = spec_for(predictor, host={"class": "TinyTransformer", "base_model": "a: b"})
    card = model_card(predictor, spec)
    head = yaml.safe_load(card.split("---\n")[1])
    assert head.pop("model-index")[0]["name"] == "L2P"
    assert head == {
        "license": "apache-2.0",
        "library_name": "foreseer",
        "tags": ["feature-caching", "diffusion", "l2p"],
        "base_model": "a: b",
    }
    for text in (
        "# L2P for TinyTransformer",
        "| anchors | 0 1 3 6 |",
        "| tap | output |",
        "| steps | 8 |",
        "| guidance | scale 3, 2 branch(es) |",
        "| recording digest | 0123 |",
        "| trajectories | 7 |",
        "| scheduler | FlowMatchEulerDiscreteScheduler |",
        "num_inference_steps=8, guidance_scale=3)",
        "dB (higher is better) | 31.5 | 30.25 |",
        "**Verdict.** Better than start of the fit by 1.25 dB (`psnr_db`).",
    ):
        assert text in card
    assert "base_model" not in model_card(predictor, spec_for(predictor)).split("---\n")[1]


def test_the_card_of_a_loops_predictor_speaks_of_the_loop_alone():
    assert type(host(torch.nn.Sequential(torch.nn.ModuleList())).scheduler).__name__ == LOOP
    predictor = random_predictor()
    card = model_card(predictor, spec_for(predictor, scheduler=LOOP))
    assert "host = fs.host(net)" in card and "for t in steps:  # 8 steps" in card
    assert "It is bound to this model and grid:" in card and "a worse sample" in card
    assert "8 steps of a loop, float32" in card and "| guidance | 2 branch(es) |" in card
    for word in ("load_pipeline", "guidance_scale", "image-generation", "scheduler class"):
        assert word not in card
    of_pipeline = model_card(predictor, spec_for(predictor))
    assert "host(net)" not in of_pipeline and "this model, grid and guidance:" in of_pipeline


def test_the_head_of_a_card_is_the_hubs_with_the_measurements_as_results():
    predictor = random_predictor()
    card = ModelCard(model_card(predictor, spec_for(predictor, metrics={"psnr_db": 31.5})))
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("psnr_db", 31.5)
    head = card.data.to_dict()
    assert (head["model-index"][0]["name"], head["library_name"]) == ("L2P", "foreseer")


def test_a_card_shows_each_picture_once():
    card = with_pictures("# L2P\n", ["a.png"])
    assert card.count("![a.png](a.png)") == 1 and with_pictures(card, ["a.png"]) == card
    assert with_pictures("# L2P\n", []) == "# L2P\n"


def test_a_card_without_measurements_says_so():
    predictor = random_predictor()
    card = model_card(predictor, spec_for(predictor, metrics={}))
    assert "(higher is better) | not measured |" in card
    assert "**Verdict.** Not measured against any formula" in card


def measured(error, low, high):
    errors = {"test_error_db": error, "test_error_db_ab2": -30.0, "test_error_db_reuse": -25.0}
    return errors | {"paired_db": -30.0 - error, "paired_low_db": low, "paired_high_db": high}


def estimated(gain, low, high):
    estimates = {"estimate_db": 20.0 + gain, "estimate_db_reuse": 20.0}
    return estimates | {"paired_db": gain, "paired_low_db": low, "paired_high_db": high}


@pytest.mark.parametrize(
    ("metrics", "sentence"),
    [
        ({}, "Not measured"),
        ({"psnr_db": 30.0}, "Not measured"),
        ({"psnr_db": 30.0, "psnr_db_reuse": 20.0, "psnr_db_ab2": 29.0}, "Better than ab2 by 1 dB"),
        ({"psnr_db": 30.0, "psnr_db_start": 30.0}, "No gain over start of the fit"),
        ({"psnr_db": 30.0, "psnr_db_taylor_1": 32.5}, "Worse than Taylor 1 by 2.5 dB"),
        ({"val_error_db": -31.0, "val_error_db_start": -30.0}, "Better than start of the fit by 1"),
        ({"open_loop_error": 0.2, "open_loop_error_reuse": 0.1}, "Worse than reuse by 0.1 ("),
        (measured(-31.2, 0.8, 1.6), "Ahead of ab2, the best rival on its own anchors: +1.2 dB"),
        (measured(-31.2, -0.1, 2.4), "Level with ab2, the best rival on its own anchors: +1.2"),
        (measured(-29.5, -0.9, -0.1), "Behind ab2, the best rival on its own anchors: -0.5 dB"),
        (estimated(2.0, 1.1, 3.0), "Ahead of reuse"),
        (estimated(2.0, 0.9, 3.0), "An estimate does not tell it apart from reuse"),
        (estimated(-5.0, -6.0, -4.4), "An estimate does not tell it apart from reuse"),
        (estimated(-5.0, -6.0, -4.6), "Behind reuse"),
    ],
)
def test_the_verdict_compares_with_the_best_rival(metrics, sentence):
    assert verdict(metrics).startswith(sentence)
