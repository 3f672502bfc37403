"""Sums of Grams hold one trajectory at a time, are the same on every process, and absorb no NaN."""

import json
import multiprocessing
import os
import subprocess
import sys
import textwrap
import weakref
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from lightning import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from recording_cases import small_header

from foreseer.training.closed_loop import L2PClosedLoop
from foreseer.training.l2p import L2PAdam, L2PLeastSquares
from foreseer.trajectories import gram as gram_sums
from foreseer.trajectories.datamodule import GramDataModule
from foreseer.trajectories.files.writer import RecordingWriter
from foreseer.trajectories.gram import GramBatches, load_grams, shared_sum, sum_grams
from foreseer.trajectories.recording import Recording, RecordingError

STEPS = 8
ANCHORS = [0, 2, 5]
NAME = "gram/output"
NUM = 12
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def trajectory(item: int, scale: float = 1.0) -> torch.Tensor:
    """A Gram of two branches of smooth features."""
    random = torch.Generator().manual_seed(item)
    t = torch.linspace(0, 1, STEPS, dtype=torch.float64)[:, None]
    a, b, c = torch.randn(3, 2, 1, 30, dtype=torch.float64, generator=random)
    noise = torch.randn(2, STEPS, 30, dtype=torch.float64, generator=random)
    features = scale * (a + b * t + c * (3 * t).sin() + 0.01 * noise)
    return features @ features.mT


def write(folder: Path, items, change=lambda item, gram: gram) -> Recording:
    sigmas = [1 - i / STEPS for i in range(STEPS)]
    head = small_header(sigmas=sigmas, taps=["output"], num_branches=2)
    with RecordingWriter(folder, head) as writer:
        setattr(writer, "_check_tensor", lambda *told: None)  # noqa: B010 - it refuses NaN as well
        for item in items:
            writer.write(item, {NAME: change(item, trajectory(item))}, {"seed": item})
    return Recording(folder)


@pytest.fixture(scope="module")
def recording(tmp_path_factory) -> Recording:
    return write(tmp_path_factory.mktemp("sums") / "recording", range(NUM))


def test_a_sum_is_that_of_its_trajectories_in_item_order_bit_for_bit(recording):
    expected = trajectory(0)
    for item in range(1, NUM):
        expected = expected + trajectory(item)
    assert torch.equal(sum_grams(recording, [NAME], recording.items)[NAME], expected)
    assert torch.equal(shared_sum(recording, NAME, recording.items), expected)
    with pytest.raises(RecordingError, match="no trajectories to sum"):
        sum_grams(recording, [NAME], [])


@pytest.mark.parametrize("num", [3, 40])
def test_a_sum_holds_two_grams_whatever_their_number(tmp_path, monkeypatch, num):
    recording = write(tmp_path / "recording", range(num))
    loaded: list[weakref.ref] = []
    held = []

    def load(recording, names, item):
        grams = load_grams(recording, names, item)
        loaded.append(weakref.ref(grams[NAME]))
        held.append(sum(each() is not None for each in loaded))
        return grams

    monkeypatch.setattr(gram_sums, "load_grams", load)
    sum_grams(recording, [NAME], recording.items)
    assert len(held) == num
    assert max(held) <= 3  # the sum, the last one and the one just read


def test_batches_are_bounded_and_hold_everything_in_order(recording, monkeypatch):
    monkeypatch.setattr(gram_sums, "CHUNK", 4)
    batches = GramBatches(recording, NAME, recording.items)
    for _ in range(2):
        found = list(batches)
        assert [batch["items"] for batch in found] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
        assert torch.equal(torch.cat([b["gram"] for b in found]), recording.stack(NAME))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.fault
def test_a_gram_that_is_not_finite_is_named_and_never_summed(tmp_path, value):
    def broken(item, gram):
        if item == 3:
            gram[1, 2, 4] = value
        return gram

    recording = write(tmp_path / "recording", range(5), broken)
    data = GramDataModule(recording.folder, validation_fraction=0.0)
    with pytest.raises(RecordingError, match=r"gram/output of item 3 in .* holds NaN or Inf"):
        data.setup("fit")
    with pytest.raises(RecordingError, match="item 3"):
        list(GramBatches(recording, NAME, [2, 3]))


def test_a_gram_of_another_shape_is_named(tmp_path):
    def other(item, gram):
        return gram[:, :4, :4].contiguous() if item == 2 else gram

    recording = write(tmp_path / "recording", range(4), other)
    with pytest.raises(RecordingError, match=r"item 2 .* has shape \(2, 4, 4\), expected that of"):
        sum_grams(recording, [NAME], recording.items)


# ------------------------------------------------------------------------------- the data module


def test_the_held_out_errors_do_not_depend_on_the_size_of_the_batches(recording, monkeypatch):
    found = []
    for chunk in (64, 1):
        monkeypatch.setattr(gram_sums, "CHUNK", chunk)
        module = L2PLeastSquares(str(recording.folder), ANCHORS)
        trainer = Trainer(max_epochs=1, **QUIET)
        data = GramDataModule(recording.folder, validation_fraction=0.7)
        trainer.fit(module, datamodule=data)
        assert len(data.val_items) > 2
        found.append(float(trainer.callback_metrics["val/open_loop_error"]))
    assert found[0] == pytest.approx(found[1], rel=1e-6)  # Lightning logs in float32


def test_validation_alone_sums_nothing(recording, monkeypatch):
    monkeypatch.setattr(gram_sums, "sum_grams", None)
    module = L2PLeastSquares(str(recording.folder), ANCHORS)
    found = Trainer(**QUIET).validate(
        module, GramDataModule(recording.folder, validation_fraction=0.7), verbose=False
    )
    assert found[0]["val/open_loop_error"] > 0


# ----------------------------------------------------------------------------- several processes


def run_rank(rank: int, world: int, folder: str, case: str) -> None:
    """What one process of a group does."""
    torch.set_num_threads(1)
    place = f"file://{folder}/{case}.{world}"
    dist.init_process_group(
        "gloo", place, rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    recording = Recording(f"{folder}/{case}")
    items = recording.items[: NUM - rank] if case == "differing" else recording.items
    try:
        content = {"sum": shared_sum(recording, NAME, items).tolist()}
    except RecordingError as error:
        content = {"error": str(error)}
    Path(f"{folder}/{case}.{world}.{rank}.json").write_text(json.dumps(content))
    dist.destroy_process_group()


def in_group(folder: Path, case: str, world: int) -> list[dict]:
    context = multiprocessing.get_context("fork")  # spawning imports torch anew: seconds each
    ranks = [
        context.Process(target=run_rank, args=(rank, world, str(folder), case))
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(90)
        assert process.exitcode == 0
    told = [folder / f"{case}.{world}.{rank}.json" for rank in range(world)]
    return [json.loads(path.read_text()) for path in told]


def sums(found: list[dict]) -> list[torch.Tensor]:
    return [torch.tensor(each["sum"], dtype=torch.float64) for each in found]


def test_two_processes_sum_to_what_one_does(tmp_path):
    recording = write(tmp_path / "whole", range(NUM))
    expected = sum_grams(recording, [NAME], recording.items)[NAME]
    one, other = sums(in_group(tmp_path, "whole", 2))
    assert torch.equal(one, other)  # every rank gets the same bits, so all solve for the same rows
    # Another order of adding NUM numbers of a size: NUM * 2^-53, about 1e-15.
    assert float((one - expected).abs().max() / expected.abs().max()) < 1e-14


def test_a_process_without_trajectories_adds_nothing(tmp_path):
    recording = write(tmp_path / "few", range(2))
    expected = sum_grams(recording, [NAME], recording.items)[NAME]
    for found in sums(in_group(tmp_path, "few", 3)):
        assert torch.equal(found, expected)


@pytest.mark.fault
def test_what_goes_wrong_on_one_process_is_told_by_all(tmp_path):
    def broken(item, gram):
        return gram * torch.nan if item == 3 else gram

    write(tmp_path / "broken", range(NUM), broken)
    for found in in_group(tmp_path, "broken", 2):
        assert "rank 1 of 2: RecordingError: gram/output of item 3" in found["error"]


@pytest.mark.fault
def test_processes_that_see_different_items_are_refused(tmp_path):
    write(tmp_path / "differing", range(NUM))
    for found in in_group(tmp_path, "differing", 2):
        assert "the 2 ranks see different items" in found["error"]


class TwoProcesses:
    """A trainer that fits, of which the number of processes and the checkpoint are asked."""

    world_size, datamodule, ckpt_path = 2, None, "last.ckpt"
    state = SimpleNamespace(fn=TrainerFn.FITTING)


def test_a_fit_by_the_network_refuses_several_processes(recording):
    module = L2PClosedLoop(recording.folder, "zoo:fashion_dit", ANCHORS)
    trainer = TwoProcesses()
    module.trainer = trainer
    with pytest.raises(ValueError, match="L2PClosedLoop was started in 2 processes, expected one"):
        module.on_fit_start()


def test_a_closed_form_has_a_parameter_for_ddp_and_saves_none(recording):
    module = L2PLeastSquares(recording.folder, ANCHORS)
    trainer = TwoProcesses()
    module.trainer = trainer
    module.setup("fit")
    assert sum(parameter.numel() for parameter in module.parameters()) == 1
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    plain = L2PLeastSquares(recording.folder, ANCHORS)
    plain.load_state_dict(checkpoint["state_dict"], strict=True)
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"], strict=True)


SCRIPT = """
import sys
import torch
from lightning import Trainer
from foreseer.training.closed_loop import L2PClosedLoop
from foreseer.training.l2p import L2PAdam, L2PLeastSquares
from foreseer.trajectories.datamodule import GramDataModule

torch.set_num_threads(1)
folder, out = sys.argv[1:]
for kind, epochs in ((L2PLeastSquares, 1), (L2PAdam, 20)):
    module = kind(folder, [0, 2, 5])
    trainer = Trainer(
        strategy="ddp", devices=2, max_epochs=epochs, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )
    trainer.fit(module, datamodule=GramDataModule(folder, validation_fraction=0.7))
    error = trainer.callback_metrics["val/open_loop_error"]
    saved = f"{out}/{kind.fit_name}.{trainer.global_rank}.pt"
    torch.save([module.predictor.weight, error, int(module.num_trajectories)], saved)
    trainer.save_checkpoint(f"{out}/{kind.fit_name}.ckpt")
"""


@pytest.mark.slow
def test_a_fit_in_two_processes_is_that_of_one(recording, tmp_path):
    script = tmp_path / "fit.py"
    script.write_text(textwrap.dedent(SCRIPT))
    subprocess.run(
        [sys.executable, str(script), str(recording.folder), str(tmp_path)],
        check=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    for kind, epochs in ((L2PLeastSquares, 1), (L2PAdam, 20)):
        module = kind(str(recording.folder), ANCHORS)
        trainer = Trainer(max_epochs=epochs, **QUIET)
        data = GramDataModule(recording.folder, validation_fraction=0.7)
        trainer.fit(module, datamodule=data)
        told = [torch.load(tmp_path / f"{kind.fit_name}.{rank}.pt") for rank in (0, 1)]
        assert torch.equal(told[0][0], told[1][0])
        # Sums differ by 1e-15; the ridge of 1e-4 bounds the condition, hence the gain, by 1e5.
        # Adam's rows are float32.
        tolerance = 1e-10 if kind is L2PLeastSquares else 1e-5
        torch.testing.assert_close(
            told[0][0], module.predictor.weight, rtol=tolerance, atol=tolerance
        )
        for _, error, count in told:
            assert error == pytest.approx(
                float(trainer.callback_metrics["val/open_loop_error"]), rel=1e-5
            )
            assert count == len(data.train_items)
        state = torch.load(tmp_path / f"{kind.fit_name}.ckpt", weights_only=True)["state_dict"]
        assert state.keys() == module.state_dict().keys()
