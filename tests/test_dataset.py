"""Datasets give the recorded values by trajectory, and an interrupted epoch resumes exactly."""

import os
import pickle
from pathlib import Path

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from recording_cases import record, trajectory
from torch.utils.data import DataLoader

from foreseer.trajectories.datamodule import RecordingDataModule
from foreseer.trajectories.dataset import TrajectoryDataset, trajectory_index, trajectory_stream
from foreseer.trajectories.epoch_sampler import EpochSampler, ResumableLoader
from foreseer.trajectories.recording import RecordingWriter

NAMES = ["gram/output", "feature/output"]
ITEMS = 11


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run")
    record(path, range(ITEMS))
    return path


def test_an_example_is_the_recorded_trajectory(folder: Path) -> None:
    dataset = TrajectoryDataset(folder, NAMES)
    assert len(dataset) == ITEMS and dataset[3].keys() == {"item", *NAMES}
    for name in NAMES:
        assert torch.equal(dataset[3][name], trajectory(3)[name])
        assert dataset[3][name].dtype == trajectory(3)[name].dtype
    chosen = TrajectoryDataset(folder, NAMES, items=[7, 2])
    assert [example["item"] for example in chosen] == [7, 2]


def test_workers_and_pickles_carry_no_open_recording(folder: Path) -> None:
    dataset = TrajectoryDataset(folder, ["final"])
    dataset[0]
    assert pickle.loads(pickle.dumps(dataset))._opened is None
    batches = list(DataLoader(dataset, batch_size=4, num_workers=2))
    assert torch.cat([batch["item"] for batch in batches]).tolist() == list(range(ITEMS))
    assert torch.equal(batches[1]["final"][0], trajectory(4)["final"])


def test_the_index_describes_every_item(folder: Path) -> None:
    table = trajectory_index(folder)
    assert table["item"][:] == list(range(ITEMS))
    assert table[5]["seed"] == 1005 and table[5]["prompt"] == "cat 5"
    assert table[5]["bytes"] == os.path.getsize(folder / table[5]["file"])
    kinds = {name: feature.dtype for name, feature in table.features.items()}
    assert kinds == {
        "item": "int64",
        "file": "string",
        "bytes": "int64",
        "xxh3": "string",
        "prompt": "string",
        "seed": "int64",
    }
    assert table.filter(lambda row: row["seed"] > 1008)["item"][:] == [9, 10]


def test_the_index_refuses_a_column_of_text_and_numbers(tmp_path: Path) -> None:
    from recording_cases import small_header

    with RecordingWriter(tmp_path, small_header()) as writer:
        writer.write(0, trajectory(0), {"seed": 1, "scale": 2})
        writer.write(1, trajectory(1), {"scale": 2.5})
        assert trajectory_index(tmp_path)["scale"][:] == [2.0, 2.5]
        assert trajectory_index(tmp_path)["seed"][:] == [1, None]
        writer.write(2, trajectory(2), {"seed": "one"})
    with pytest.raises(ValueError, match="meta 'seed' is text in some items"):
        trajectory_index(tmp_path)


def test_the_stream_keeps_float64_and_widens_bfloat16_exactly(folder: Path) -> None:
    stream = trajectory_stream(folder, NAMES, items=[4, 1, 3])
    assert stream.features["gram/output"].dtype == "float64"
    assert stream.features["feature/output"].shape == (2, 5, 6, 4)
    assert stream.features["feature/output"].dtype == "float32"
    batches = list(DataLoader(stream, batch_size=3))
    assert batches[0]["item"].tolist() == [4, 1, 3]
    for row, item in enumerate([4, 1, 3]):
        expected = trajectory(item)
        assert torch.equal(batches[0]["gram/output"][row], expected["gram/output"])
        assert torch.equal(batches[0]["feature/output"][row], expected["feature/output"].float())


def test_stream_workers_share_the_items(folder: Path) -> None:
    loader = DataLoader(trajectory_stream(folder, ["final"]), batch_size=None, num_workers=2)
    assert sorted(example["item"] for example in loader) == list(range(ITEMS))


def test_the_stream_refuses_a_shape_it_did_not_announce(tmp_path: Path) -> None:
    record(tmp_path, range(2))
    from recording_cases import small_header

    with RecordingWriter(tmp_path, small_header()) as writer:
        writer.write(2, trajectory(2, tokens=9), {})
    with pytest.raises(ValueError, match=r"item 2: 'feature/output' has shape \(2, 5, 9, 4\)"):
        list(trajectory_stream(tmp_path, NAMES))


def test_the_order_depends_on_seed_and_epoch_only() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = EpochSampler(20, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    orders = [order(seed, epoch) for seed in (0, 1, 2**32) for epoch in (0, 1)]
    assert all(sorted(o) == list(range(20)) for o in orders)
    assert len({tuple(o) for o in orders}) == len(orders)
    assert order(1, 1) == orders[3]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_restored_loader_goes_on_with_the_batches_left(folder: Path, num_workers: int) -> None:
    def loader() -> ResumableLoader:
        made = ResumableLoader(TrajectoryDataset(folder, ["final"]), 3, 5, num_workers)
        made.sampler.set_epoch(2)  # type: ignore[attr-defined]
        return made

    def items(made: ResumableLoader) -> list[list[int]]:
        return [batch["item"].tolist() for batch in made]

    whole = items(loader())
    assert [len(batch) for batch in whole] == [3, 3, 3, 2]
    for taken in range(5):
        interrupted, restored = loader(), loader()
        batches = iter(interrupted)
        assert [next(batches)["item"].tolist() for _ in range(taken)] == whole[:taken]
        restored.load_state_dict(interrupted.state_dict())
        assert items(restored) == (whole[taken:] or whole)  # at its end the next epoch begins
        assert items(restored) == whole
        if num_workers and taken:
            break  # starting workers is slow; one interrupted case shows prefetch does not count


class Noisy(lightning.LightningModule):
    """A linear model with momentum: its weights remember the order of the batches."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(12, 1, dtype=torch.float64)
        torch.nn.init.ones_(self.layer.weight)
        torch.nn.init.zeros_(self.layer.bias)

    def training_step(self, batch: dict, _: int) -> torch.Tensor:
        return self.layer(batch["final"].double().flatten(1)).square().mean()

    def validation_step(self, batch: dict, _: int) -> None:
        assert batch["item"].numel()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def fit(folder: Path, out: Path, resume: Path | None = None) -> torch.Tensor:
    """Train three epochs, keeping a checkpoint of every step and epoch; the final weights."""
    model = Noisy()
    keep = [
        ModelCheckpoint(out, "step-{step}", save_top_k=-1, every_n_train_steps=1),
        ModelCheckpoint(out, "end-{epoch}", save_top_k=-1, every_n_epochs=1),
    ]
    trainer = lightning.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=keep if resume is None else [],
        enable_checkpointing=resume is None,
    )
    data = RecordingDataModule(folder, ["final"], 2, validation_fraction=0.2, seed=1)
    trainer.fit(model, data, ckpt_path=resume, weights_only=True)
    assert trainer.current_epoch == 3
    return model.layer.weight.detach().clone()


@pytest.mark.filterwarnings("ignore")  # Lightning's advice on workers and checkpoint folders
def test_training_resumes_bit_for_bit_from_every_checkpoint(folder: Path, tmp_path: Path) -> None:
    expected = fit(folder, tmp_path)
    checkpoints = sorted(tmp_path.glob("*.ckpt"))
    assert len([path for path in checkpoints if path.name.startswith("end")]) == 3
    steps = len(checkpoints) - 3
    assert steps >= 9 and steps % 3 == 0
    different = [p.name for p in checkpoints if not torch.equal(fit(folder, tmp_path, p), expected)]
    assert different == []


def test_the_data_module_splits_by_trajectory(folder: Path) -> None:
    data = RecordingDataModule(folder, ["final"], 4, validation_fraction=0.3, seed=0)
    data.setup()
    parts = [data.train_items, data.val_items, data.test_items]
    assert sorted(item for part in parts for item in part) == list(range(ITEMS))
    for batch_size in (1, 7):
        other = RecordingDataModule(folder, ["final"], batch_size, 0.3, seed=0)
        other.setup()
        assert [other.train_items, other.val_items, other.test_items] == parts
    train = torch.cat([batch["item"] for batch in data.train_dataloader()]).tolist()
    val = torch.cat([batch["item"] for batch in data.val_dataloader()]).tolist()
    assert sorted(train) == data.train_items and val == data.val_items and val
    everything = RecordingDataModule(folder, ["final"], 4, validation_fraction=0.0, seed=0)
    everything.setup()
    assert everything.train_items == list(range(ITEMS)) and everything.val_dataloader() == []


def test_an_empty_part_is_refused(tmp_path: Path) -> None:
    record(tmp_path, [0])
    with pytest.raises(ValueError, match="1 items split into"):
        RecordingDataModule(tmp_path, ["final"], 4, validation_fraction=0.5, seed=0).setup()
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        RecordingDataModule(tmp_path, ["final"], 4, validation_fraction=1.0, seed=0)
