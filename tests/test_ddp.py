"""Two processes that share a batch train what one process trains on all of it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ddp_training
import lightning
import pytest
import torch
from ddp_training import CROSSED
from lesa_training_cases import make_recording
from recording_cases import record as write_recording
from test_disca import SETTINGS
from tiny_hosts import pipeline

from foreseer.training.plumbing.resuming import check_strategy
from foreseer.trajectories import epoch_sampler as sampler
from foreseer.trajectories.dataset import TrajectoryDataset
from foreseer.trajectories.epoch_sampler import EpochSampler, ResumableLoader, everything
from foreseer.trajectories.prompts import class_items
from foreseer.trajectories.recorder import record

HERE = Path(__file__).parent
NAMES = ("lesa_feature", "lesa_sample", "disca")


def batches(size: int, batch_size: int, rank: int, world: int, position: int = 0) -> list[list]:
    """The batches one rank trains on."""
    one = EpochSampler(size, 7, batch_size, rank, world)
    one.set_epoch(3)
    one.position = position
    share = batch_size // world
    order = list(one)
    return [order[start : start + share] for start in range(0, len(order), share)]


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("size", [6, 12, 13, 14, 17])
def test_the_shares_of_all_ranks_are_the_batches_of_one(size: int, world: int) -> None:
    whole = batches(size, 6, 0, 1)
    shares = [batches(size, 6, rank, world) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1  # no rank waits for another
    for number, parts in enumerate(zip(*shares, strict=True)):
        assert len({len(part) for part in parts}) == 1
        together = [item for part in parts for item in part]
        assert together == whole[number][: len(together)]
        assert len(whole[number]) - len(together) == len(whole[number]) % world
    assert sum(map(len, shares[0])) == len(EpochSampler(size, 7, 6, 0, world))


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3)])
def test_an_epoch_is_resumed_by_another_number_of_processes(before: int, after: int) -> None:
    interrupted = EpochSampler(24, 7, 6, 0, before)
    for _ in range(2):
        interrupted.advance()
    position = interrupted.state_dict()["position"]
    left = [batches(24, 6, rank, after, position) for rank in range(after)]
    together = [sum(parts, []) for parts in zip(*left, strict=True)]
    assert together == batches(24, 6, 0, 1)[2:]


def test_only_whole_batches_when_asked_for(tmp_path: Path) -> None:
    whole = EpochSampler(13, 7, 6, 0, 1, drop_last=True)
    assert len(list(whole)) == len(whole) == 12
    assert list(whole) == list(EpochSampler(13, 7, 6, 0, 1))[:12]
    write_recording(tmp_path, range(5))
    with pytest.raises(ValueError, match="batch_size is 6, expected at most the 5 examples"):
        ResumableLoader(TrajectoryDataset(tmp_path, ["final"]), 6, 0, drop_last=True)


def test_the_position_is_zero_after_a_last_batch_that_could_not_be_dealt() -> None:
    one = EpochSampler(13, 0, 6, 0, 2)  # 6 + 6, and one that is left out
    for expected in (6, 0):
        one.advance()
        assert one.state_dict() == {"position": expected}


def test_a_batch_that_cannot_be_shared_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_recording(tmp_path, range(4))
    dataset = TrajectoryDataset(tmp_path, ["final"])
    monkeypatch.setattr(sampler, "_grouped", lambda: True)
    monkeypatch.setattr(sampler.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(sampler.dist, "get_world_size", lambda: 2)
    loader = ResumableLoader(dataset, 4, 0)
    assert loader.batch_size == 2 and len(loader) == 1
    with pytest.raises(ValueError, match="batch_size is 3 over all 2 processes"):
        ResumableLoader(dataset, 3, 0)
    with pytest.raises(ValueError, match="there are 1 examples"):
        ResumableLoader(TrajectoryDataset(tmp_path, ["final"], [0]), 2, 0)
    assert list(everything(dataset)) == [0, 1, 2, 3]


def test_a_strategy_that_waits_for_all_gradients_is_refused() -> None:
    class Wrapped(torch.nn.parallel.DistributedDataParallel):
        def __init__(self, find_unused_parameters: bool) -> None:
            torch.nn.Module.__init__(self)
            self.find_unused_parameters = find_unused_parameters

    module = lightning.LightningModule()
    for wrapped in (module, Wrapped(True), Wrapped(False)):
        module._trainer = SimpleNamespace(strategy=SimpleNamespace(model=wrapped))  # type: ignore
        if wrapped is module or wrapped.find_unused_parameters:
            check_strategy(module)
            continue
        with pytest.raises(ValueError, match="strategy: ddp_find_unused_parameters_true"):
            check_strategy(module)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What one process, and each of two, has at the end of every training."""
    folder = tmp_path_factory.mktemp("ddp")
    lesa = make_recording(folder / "lesa")
    options: dict[str, Any] = {"taps": ["hidden", "output"], "features": "full", "batch_size": 4}
    items = class_items(10, 3)
    disca = record(pipeline("dit_guided"), items, folder / "disca", **options, **SETTINGS)
    paths = os.pathsep.join([str(HERE), *(p for p in sys.path if p)])
    environment = {**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    recordings = {name: str(disca if name == "disca" else lesa) for name in NAMES}
    one, two = folder / "one", folder / "two"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ddp_training.disca, "opened_for", lambda *_, **__: pipeline("dit_guided"))
        for made in (one, two):
            made.mkdir()
        for name in NAMES:
            ddp_training.train(name, recordings[name], one)
        words = [str(HERE / "ddp_training.py"), str(lesa), str(disca), str(two), str(one)]
        command = [sys.executable, *torchrun, *words]
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=400
        )
        assert result.returncode == 0, result.stderr[-4000:]
        for name in CROSSED:
            ddp_training.train(name, recordings[name], one, two / f"{name}.ckpt")
    found = {
        name: [
            torch.load(folder / run / f"{name}-{rank}.pt")
            for run, rank in (("one", 0), ("two", 0), ("two", 1))
        ]
        for name in (*NAMES, *(f"crossed_{name}" for name in CROSSED))
    }
    return found


def differences(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> torch.Tensor:
    """Difference of every number, relative to the largest of its tensor."""
    found = [
        ((one[name] - other[name]).abs() / one[name].abs().max().clamp_min(1e-30))
        .flatten()
        .double()
        for name in one
    ]
    return torch.cat(found)


def part(training: dict[str, Any], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors of one part of a module."""
    return {key: value for key, value in training["state"].items() if key.startswith(prefix)}


def moved(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Largest relative difference of two predictors."""
    return float(differences(part(one, "predictor."), part(other, "predictor.")).max())


# Float32: means over 2 + 2 and over 4 samples are rounded differently, by 6e-8 per update. The
# trainings cast what they read to float32, so float64 would not make it smaller. DisCa's Adam
# divides by the size of a gradient however small it is.
TOLERANCES = {"lesa_feature": 1e-6, "lesa_sample": 1e-6, "disca": 1e-3}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_train_what_one_trains(
    name: str, trained: dict[str, list[dict[str, Any]]]
) -> None:
    one, first, second = trained[name]
    assert first["steps"] == second["steps"] == one["steps"] > 0
    for key, tensor in first["state"].items():
        if not key.endswith("fit_seconds"):
            assert torch.equal(tensor, second["state"][key]), key  # bit for bit on both ranks
    assert first["metrics"].keys() == one["metrics"].keys()
    assert first["metrics"] == second["metrics"]

    found = moved(one, first)
    print(json.dumps({"training": name, "updates": one["steps"], "difference": found}))
    assert found < TOLERANCES[name]
    if name == "disca":
        heads = differences(part(one, "adversary."), part(first, "adversary."))
        # Rows of the discriminator with gradients of the size of the rounding move by the rate of
        # 0.01 in the direction of the noise; all others agree.
        assert (heads < 1e-3).double().mean() > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("name", CROSSED)
def test_a_checkpoint_of_one_process_is_finished_by_two_and_the_other_way_round(
    name: str, trained: dict[str, list[dict[str, Any]]]
) -> None:
    whole = trained[name][0]
    by_one, first, second = trained[f"crossed_{name}"]
    for key, tensor in first["state"].items():
        assert key.endswith("fit_seconds") or torch.equal(tensor, second["state"][key]), key
    for crossed in (by_one, first):
        assert crossed["steps"] == whole["steps"]
        found = moved(whole, crossed)
        print(json.dumps({"crossed": name, "difference": found}))
        assert found < TOLERANCES[name]
