"""A readout with its normal equations takes more recordings without its old trajectories."""

import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from readout_cases import ANCHORS, deployed_states, module_of, recorded, trainer_of
from test_readout_fit import GRID, alone, parts_of, solved
from test_readout_fit import Killed as Interrupted
from tiny_hosts import items, pipeline, settings

from foreseer.checkpoints.config import CheckpointError
from foreseer.checkpoints.format import SEGMENTS_FILE, load_predictor
from foreseer.checkpoints.spec import PredictorMismatch
from foreseer.cli import main
from foreseer.evaluation.measure import References
from foreseer.fit_commands import refit as refit_command
from foreseer.training.export import export_command, export_predictor
from foreseer.training.readout import segment as readout_segment
from foreseer.training.readout.readout_refit import refit_readout
from foreseer.training.readout.segment import Part, Total, extend_segment
from foreseer.training.readout.shipped_sums import read_segments
from foreseer.trajectories.datamodule import ItemsDataModule
from foreseer.trajectories.files.shards import read_shard, write_shard
from foreseer.trajectories.recording import Recording

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def extended(parts: list[Part], fitted):
    return extend_segment(lambda: iter(parts), fitted, GRID, lambda tensors: None, 1.0)


def test_an_extended_segment_is_solved_for_the_sums_of_both():
    parts, _ = parts_of(alone, noise=0.3)
    first, second = parts[:2], parts[2:]
    fitted = solved(first, GRID).segment
    found = extended(second, fitted)
    weights = fitted.start + fitted.delta
    own = readout_segment._readout_sums(
        lambda: iter(second), fitted.start, weights, fitted.inner, GRID, 1.0
    )
    together = Total.of(own, [0, 1, 2, 3, 4], fitted.sums)
    for name, tensor in vars(together).items():
        torch.testing.assert_close(vars(found.segment.sums)[name], tensor, **CLOSE)
    delta, readout = together.solve(readout_segment.ROWS_RIDGE, found.strength)
    torch.testing.assert_close(found.segment.delta, delta, **CLOSE)
    torch.testing.assert_close(found.segment.constant, readout[-1], **CLOSE)
    assert torch.equal(found.segment.inner, fitted.inner)
    assert found.gain_db > 0  # of 4 trajectories, then of 10


def test_more_trajectories_lower_the_error_of_those_left_out():
    parts, _ = parts_of(alone, noise=1.0)
    fitted = solved(parts[:1], GRID).segment
    one, both = extended(parts[1:2], fitted), extended(parts[1:], fitted)
    assert both.gain_db > one.gain_db > 0


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Recordings a (6), b (4) and c (2), and the readout of a with its sums."""
    folder = tmp_path_factory.mktemp("readout_refit")
    every, pipe = items("dit_guided", 12), pipeline("dit_guided")
    for name, part in {"a": every[:6], "b": every[6:10], "c": every[10:]}.items():
        recorded(pipe, part, folder / name, settings("dit_guided"))
    module = module_of(str(folder / "a"), pipe, keep_sums=True)
    trainer = trainer_of()
    trainer.fit(module, datamodule=ItemsDataModule(folder / "a", 0.0, batch_size=2))
    export_predictor(module, folder / "predictor", {"psnr_db": 30.0})
    trainer.save_checkpoint(folder / "last.ckpt")
    export_command(str(folder / "last.ckpt"), str(folder / "again"))
    return folder


def refitted(place: Path, *names: str, start: str = "predictor"):
    folder = place / start
    recordings = [str(place / name) for name in names]
    old = load_predictor(folder)
    return refit_readout(old, folder, recordings, pipeline("dit_guided"), batch_size=2)


def test_the_sums_are_exported_from_the_module_and_its_checkpoint_alike(place):
    one, other = (read_shard(place / name / SEGMENTS_FILE) for name in ("predictor", "again"))
    assert one.keys() == other.keys() and "0/normal" in one
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    old = load_predictor(place / "predictor")
    for anchor, segment in read_segments(place / "predictor", old, old.spec).items():
        number = old.anchors.index(anchor)
        side = 3 if old.neighbours else 1
        outer = segment.outer.permute(2, 3, 1, 0).flatten(0, 2)
        assert outer.shape == (side * side * old.rank, old.patch)
        width = (1 + old.reach(number)) * old.width
        assert torch.equal(segment.inner, old.inner[number, :, :width])


def test_sums_that_were_not_asked_for_are_not_there(place, tmp_path):
    module = module_of(str(place / "a"), pipeline("dit_guided"))
    trainer_of().fit(module, datamodule=ItemsDataModule(place / "a", 0.0, batch_size=2))
    export_predictor(module, tmp_path / "p", {})
    assert not (tmp_path / "p" / SEGMENTS_FILE).exists()
    with pytest.raises(CheckpointError, match="has no segments.safetensors.*keep_sums: true"):
        refit_readout(load_predictor(tmp_path / "p"), tmp_path / "p", [place / "b"], None)


def test_a_refit_is_of_all_trajectories_and_is_saved_as_it_is(place, tmp_path):
    found = refitted(place, "b")
    old = load_predictor(place / "predictor")
    before = read_segments(place / "predictor", old, old.spec)
    for anchor, segment in before.items():
        added = found.kept[f"{anchor}/inner"] - segment.sums.inner
        assert bool((torch.linalg.eigvalsh(added) > -1e-9 * added.diagonal().max()).all())
    assert found.spec.num_trajectories == 10 and found.sums.count == 10
    assert "psnr_db" not in found.spec.metrics and len(found.gains) == len(ANCHORS)
    saved = load_predictor(found.save(tmp_path / "new"))
    state = found.predictor.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in saved.state_dict().items())
    assert not torch.equal(saved.weight, old.weight)


def test_recordings_are_added_together_as_one_after_the_other(place, tmp_path):
    together = refitted(place, "b", "c")
    shutil.copytree(place / "c", tmp_path / "c")
    refitted(place, "b").save(tmp_path / "first")
    after = refitted(tmp_path, "c", start="first")
    assert together.sums.digest == after.sums.digest and together.added == 6 and after.added == 2
    for name, tensor in together.kept.items():
        torch.testing.assert_close(after.kept[name], tensor, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(after.predictor.weight, together.predictor.weight, rtol=1e-5, atol=0)


def test_the_command_adds_and_says_so(place, tmp_path, capsys, monkeypatch):
    pipe = pipeline("dit_guided")
    monkeypatch.setattr("foreseer.training.refit.opened_for", lambda *arguments: pipe)
    words = ["refit", "--predictor", str(place / "predictor"), "--out", str(tmp_path / "new")]
    main([*words, "--recordings", f'["{place / "b"}"]', "--pipeline", "anything"])
    printed = capsys.readouterr().out
    assert "4 trajectories" in printed and "added to 6 of" in printed
    assert load_predictor(tmp_path / "new").spec.num_trajectories == 10
    references = References(Recording(place / "b"), [6, 7], 2)
    states = deployed_states(pipe, load_predictor(tmp_path / "new"), references)
    assert all(tensor.isfinite().all() for batch in states for tensor in batch.values())


def test_a_killed_fit_keeps_its_sums(place, tmp_path):
    whole = read_shard(place / "predictor" / SEGMENTS_FILE)
    module = module_of(str(place / "a"), pipeline("dit_guided"), keep_sums=True)
    data = ItemsDataModule(place / "a", 0.0, batch_size=2)
    saving = ModelCheckpoint(tmp_path, "last", every_n_epochs=1, save_on_train_epoch_end=True)
    with pytest.raises(SystemExit):
        trainer_of(saving, Interrupted(2), enable_checkpointing=True).fit(module, datamodule=data)
    resumed = module_of(str(place / "a"), pipeline("dit_guided"), keep_sums=True)
    trainer_of().fit(resumed, datamodule=data, ckpt_path=tmp_path / "last.ckpt")
    assert resumed.sums.keys() == whole.keys()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in resumed.sums.items())


@pytest.mark.fault
def test_another_pipeline_than_the_recorded_one_is_refused(place):
    other = pipeline("dit_guided")
    next(other.transformer.parameters()).data.add_(1e-3)
    old = load_predictor(place / "predictor")
    with pytest.raises(PredictorMismatch, match="b was recorded on another host: weights"):
        refit_readout(old, place / "predictor", [place / "b"], other, 2)
    module = module_of(str(place / "a"), None)
    module.pipeline = other
    with pytest.raises(PredictorMismatch, match="a was recorded on another host: weights"):
        trainer_of().fit(module, datamodule=ItemsDataModule(place / "a", 0.0, batch_size=2))


@pytest.mark.fault
def test_a_foreign_folder_is_refused_before_the_walk(place):
    told, b = str(place / "predictor"), str(place / "b")
    with pytest.raises(CheckpointError, match="expected an empty folder"):
        refit_command(told, [b], b, None, "zoo:no_such")


@pytest.mark.fault
def test_trajectories_already_there_are_refused(place):
    with pytest.raises(ValueError, match="among the 6 in the sum already"):
        refitted(place, "a")
    with pytest.raises(ValueError, match="among the 10 in the sum already"):
        refitted(place, "b", "b")


@pytest.mark.fault
def test_a_readout_is_refitted_on_its_pipeline_and_with_no_ridge(place, tmp_path):
    told, out = str(place / "predictor"), str(tmp_path / "new")
    with pytest.raises(ValueError, match="chooses its own strengths: found ridge 0.1"):
        refit_command(told, [str(place / "b")], out, 0.1, "zoo:fashion_dit")
    with pytest.raises(ValueError, match="pipeline"):  # it was at hand, and no name was recorded
        refit_command(told, [str(place / "b")], out)
    with pytest.raises(ValueError, match="no recordings were given"):
        refit_command(told, [], out)


@pytest.mark.fault
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("0/normal"), "it holds"),
        (lambda t: t.update({"0/delta": t["0/delta"][:1]}), "it holds"),
        (lambda t: t.update({"0/normal": t["0/normal"].float()}), "it holds"),
        (lambda t: t.update({"2/inner": -t["2/inner"]}), "no sum"),
        (lambda t: t["2/cross"].fill_(torch.nan), "no sum"),
    ],
)
def test_sums_that_are_not_those_of_the_readout_are_refused(change, said, place, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(place / "predictor", folder)
    old = load_predictor(folder)
    tensors = {name: t.clone() for name, t in read_shard(folder / SEGMENTS_FILE).items()}
    change(tensors)
    write_shard(folder / SEGMENTS_FILE, tensors, {"recording_digest": old.spec.recording_digest})
    with pytest.raises(CheckpointError, match=said):
        read_segments(folder, old, old.spec)


@pytest.mark.fault
def test_sums_of_another_readout_are_refused(place, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(place / "predictor", folder)
    old = load_predictor(folder)
    write_shard(
        folder / SEGMENTS_FILE, read_shard(folder / SEGMENTS_FILE), {"recording_digest": "x"}
    )
    with pytest.raises(CheckpointError, match="of the recording x, the readout of"):
        read_segments(folder, old, old.spec)
