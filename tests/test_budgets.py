"""Predictors for several numbers of evaluations lie in one folder, and one of them is taken."""

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import tiny_pipe
from test_refit import SETTINGS, made

import foreseer as fs
from foreseer.checkpoints.budgets import BUDGETS_FILE, read_budgets
from foreseer.checkpoints.config import CheckpointError
from foreseer.checkpoints.format import load_predictor, load_predictors
from foreseer.cli import main


@pytest.fixture(scope="module")
def recording(tmp_path_factory) -> str:
    return made(tmp_path_factory.mktemp("budgets") / "recording", 0, 8)


@pytest.fixture(scope="module")
def fitted(recording, tmp_path_factory) -> tuple[dict[int, Any], Path]:
    folder = tmp_path_factory.mktemp("fitted") / "several"
    found = fs.fit(recording, evaluations=[3, 2], method="lstsq", out=str(folder))
    return found, folder


def drawn(pipe: Any, predictor: Any, **options: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    with fs.forecasting(pipe, predictor, **options):
        return pipe([0], generator=generator, output_type="latent", **SETTINGS).images


def test_a_fit_of_several_evaluations_is_one_folder_of_which_one_is_taken(fitted):
    found, folder = fitted
    assert sorted(found) == [2, 3] and read_budgets(folder) == [2, 3]
    pipe = tiny_pipe()
    for evaluations, predictor in found.items():
        assert len(predictor.spec.anchors) == evaluations
        alone = load_predictor(folder / str(evaluations))
        assert torch.equal(alone.weight, predictor.weight)
        expected = drawn(pipe, alone)
        for name in (found, str(folder), folder):
            assert torch.equal(drawn(pipe, name, evaluations=evaluations), expected)
        assert torch.equal(fs.load(folder, evaluations=evaluations).weight, predictor.weight)


def test_all_of_a_folder_are_had_at_once_and_one_by_its_anchors(fitted):
    found, folder = fitted
    loaded = load_predictors(folder)
    assert list(loaded) == [2, 3]
    assert all(torch.equal(loaded[each].weight, found[each].weight) for each in found)
    assert list(load_predictors(folder / "3")) == [3]
    with pytest.raises(CheckpointError, match="no folder .*nowhere"):
        load_predictors(folder / "nowhere")


def test_the_card_says_what_each_is_worth(fitted):
    found, folder = fitted
    card = (folder / "README.md").read_text()
    names = [name for name in found[2].spec.metrics if name in found[3].spec.metrics]
    assert names and all(name in card for name in names)
    for evaluations, predictor in found.items():
        worth = f"{predictor.spec.metrics[sorted(names)[0]]:.2f}"
        line = next(line for line in card.splitlines() if line.startswith(f"| {evaluations} |"))
        assert worth in line
    assert "evaluations=2" in card


def test_the_command_line_fits_several_and_draws_with_one(recording, tmp_path, monkeypatch):
    out = tmp_path / "several"
    words = ["fit", "--recording", recording, "--method", "lstsq", "--out", str(out)]
    main([*words, "--evaluations", "[2, 3]"])
    assert read_budgets(out) == [2, 3]
    main([*words, "--evaluations", "2,3"])  # replaced, as one predictor is
    main([*words[:-1], str(tmp_path / "one"), "--evaluations", "2"])
    assert read_budgets(tmp_path / "one") is None
    assert len(load_predictor(tmp_path / "one").spec.anchors) == 2
    pipe = tiny_pipe()
    monkeypatch.setattr("foreseer.integration.pipelines.load.opened", lambda *arguments: pipe)
    words = ["generate", "--pipeline", "anything", "--predictor", str(out), "--class_labels", "[1]"]
    words += ["--guidance_scale", "3", "--out", str(tmp_path / "s.png")]
    main([*words, "--evaluations", "3"])
    assert (tmp_path / "s.png").is_file()


def test_several_are_saved_as_one(fitted, tmp_path):
    found, _ = fitted
    fs.save(found, str(tmp_path / "again"))
    assert read_budgets(tmp_path / "again") == [2, 3]
    assert torch.equal(fs.load(tmp_path / "again", evaluations=2).weight, found[2].weight)
    with pytest.raises(CheckpointError, match="is for 2 of evaluations, asked for 5"):
        fs.save({5: found[2]}, str(tmp_path / "wrong"))


def test_one_is_fetched_from_the_hub_and_no_other(fitted, tmp_path, monkeypatch):
    _, folder = fitted
    fetched = []

    def download(repo_id, revision, files, *limit):
        fetched.append((repo_id, revision, tuple(files)))
        return folder

    monkeypatch.setattr("foreseer.checkpoints.hub.download", download)
    monkeypatch.setattr("foreseer.checkpoints.budgets.download", download)
    loaded = load_predictor("owner/several", "v1", evaluations=3)
    assert len(loaded.spec.anchors) == 3
    assert fetched[1][:2] == ("owner/several", "v1")
    assert all(name.startswith("3/") for name in fetched[1][2])


@pytest.mark.fault
def test_several_without_a_number_are_refused_in_words(fitted):
    found, folder = fitted
    with pytest.raises(CheckpointError, match="holds predictors for 2, 3 evaluations, asked for N"):
        load_predictor(folder)
    with pytest.raises(CheckpointError, match="asked for 7; say evaluations=3, or name .*/3"):
        drawn(tiny_pipe(), str(folder), evaluations=7)
    with pytest.raises(ValueError, match=r"are for \[2, 3\] evaluations, asked for None"):
        drawn(tiny_pipe(), found)
    with pytest.raises(CheckpointError, match="is for 2 of evaluations, asked for 3"):
        drawn(tiny_pipe(), found[2], evaluations=3)
    with pytest.raises(CheckpointError, match="is for 2 of evaluations, asked for 3"):
        load_predictor(folder / "2", evaluations=3)
    with pytest.raises(CheckpointError, match="is for no number of evaluations"):
        drawn(tiny_pipe(), fs.predictors.Taylor(1), evaluations=3)


@pytest.mark.fault
@pytest.mark.parametrize(
    "told",
    [
        "[]",
        "{",
        '{"schema_version": 1}',
        '{"schema_version": 1, "evaluations": []}',
        '{"schema_version": 1, "evaluations": [3, 2]}',
        '{"schema_version": 1, "evaluations": ["../x"]}',
        '{"schema_version": 1, "evaluations": [0, 2]}',
        '{"schema_version": 9, "evaluations": [2]}',
        " " * 5000,
    ],
)
def test_a_malformed_list_is_refused(told, tmp_path):
    (tmp_path / BUDGETS_FILE).write_text(told)
    with pytest.raises(CheckpointError, match="budgets.json (is no|holds|has schema_version 9)"):
        load_predictor(tmp_path, evaluations=2)


@pytest.mark.fault
def test_a_foreign_folder_and_anchors_for_several_are_refused_before_a_fit(recording, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="holds notes.txt"):
        fs.fit(recording, evaluations=[2, 3], method="lstsq", out=str(tmp_path))
    for evaluations, anchors in (([2, 3], [0, 1]), ([2, 2], None), ([], None)):
        with pytest.raises(ValueError, match="expected different numbers and no anchors"):
            fs.fit(recording, evaluations=evaluations, anchors=anchors, method="lstsq")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
