"""Every training that is killed and started again ends in the bits of one that was not."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dit_teacher import TeacherModule
from lightning.pytorch.trainer.states import TrainerFn
from nightly import nightly, selected
from source_files import PACKAGE
from test_teacher import tiny_teacher
from training_crash_cases import CASES

from foreseer.training.plumbing.resuming import RANDOM_STATE, close_epoch

HERE = Path(__file__).parent
RECIPES = HERE.parent / "examples" / "bundled_models"
SOLVED = {
    "l2p",
    "l2p_batches",
    "l2p_lstsq",
    "l2p_bands",
    "l2p_groups",
    "l2p_gram",
    "l2p_continuous",
    "readout",
    "emoji_l2p",
}
RESUMED = [name for name, case in CASES.items() if case.resumes]
BY_DEFAULT = ("l2p_lstsq", "lesa")  # one that is solved and one that descends


@pytest.fixture(scope="module")
def report(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What was seen of every training that is asked for, killed and whole."""
    folder = tmp_path_factory.mktemp("crash")
    paths = os.pathsep.join([str(HERE), *(p for p in sys.path if p)])
    environment = {**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    asked = selected(request, "name")
    if any(CASES[name].config.startswith("distill/") for name in asked):
        asked.add("guidance")  # where the others start
    names = [name for name in CASES if name in asked]
    command = [sys.executable, str(HERE / "training_crash.py"), str(folder), *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=450)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_shipped_training_is_killed() -> None:
    shipped = {
        f"{folder}/{path.stem}"
        for folder in ("fit", "distill")
        for path in (PACKAGE / "configs" / folder).glob("*.yaml")
    }
    recipes = {f"bundled_models/{path.stem}" for path in RECIPES.glob("*.yaml")}
    assert {case.config for case in CASES.values()} == shipped | recipes


@pytest.mark.fault
@pytest.mark.slow
@pytest.mark.parametrize("name", nightly(CASES, BY_DEFAULT))
def test_case_18_interrupted_training_ends_in_the_same_bits(
    name: str, report: dict[str, Any]
) -> None:
    seen, kills = report[name], CASES[name].kills
    assert [run["killed"] for run in seen["broken"]] == [True] * len(kills) + [False]
    assert not seen["whole"][0]["killed"]
    lost = 0
    for kill, run, following in zip(kills, seen["broken"], seen["broken"][1:], strict=False):
        died, kept = run["died"], run["kept"] or {"step": 0, "epoch": 0}
        if kill.at == "batch":
            assert (died["epoch"], died["batch"]) == (kill.epoch, kill.batch)
        elif kill.at == "write":
            assert died["unfinished"] > 1000  # written, and not yet in its place
        if died["epoch"] > 0 and name != "l2p_adam":  # which keeps every second epoch
            assert run["kept"] is not None
        lost += died["step"] > kept["step"] or run["kept"] is None
        if following["begun"] is not None:  # else nothing was left to do
            assert following["begun"]["step"] == (kept["step"] if CASES[name].resumes else 0)
    assert lost > 0 or CASES[name].steps  # work was lost, and done again
    if CASES[name].steps or name in ("guidance", "teacher"):
        assert any(run["begun"] and run["begun"]["batch"] > 0 for run in seen["broken"])
    assert seen["different"] == [] and seen["files"] == []
    assert seen["compared"]["state_dict"] > 0
    assert seen["compared"]["optimizer_states"] > 0 or name in SOLVED


@pytest.mark.fault
@pytest.mark.slow
@pytest.mark.parametrize("name", nightly(RESUMED, BY_DEFAULT))
def test_case_18_another_training_is_refused_at_the_checkpoints_of_this_one(
    name: str, report: dict[str, Any]
) -> None:
    assert "is of another fit: it has model.anchors" in report[name]["refused"]


def test_a_checkpoint_after_an_epochs_last_batch_is_one_between_epochs() -> None:
    """What Lightning writes there, and what it writes where the epoch has ended."""

    def written(ready: int, processed: int, completed: int, last: bool) -> dict[str, Any]:
        counts = {"ready": ready, "started": ready, "processed": processed, "completed": completed}
        batches = {"total": dict(counts), "current": dict(counts), "is_last_batch": last}
        one = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
        epochs = {"total": dict(one), "current": dict(one)}
        loop = {"epoch_loop.batch_progress": batches, "epoch_progress": epochs}
        return {"loops": {"fit_loop": loop}}

    closed = written(3, 3, 2, last=True)
    close_epoch(closed)
    loop = closed["loops"]["fit_loop"]
    assert set(loop["epoch_progress"]["total"].values()) == {1}
    assert set(loop["epoch_loop.batch_progress"]["total"].values()) == {3}
    assert set(loop["epoch_loop.batch_progress"]["current"].values()) == {0}
    for others in (written(2, 2, 1, last=False), written(3, 3, 3, last=True)):
        before = json.dumps(others)
        close_epoch(others)
        assert json.dumps(others) == before


def module_of(world: int, fn: TrainerFn = TrainerFn.FITTING) -> TeacherModule:
    """A training of so many processes, which is being fitted."""
    module = tiny_teacher()
    told = {"world_size": world, "state": SimpleNamespace(fn=fn), "ckpt_path": "last.ckpt"}
    module._trainer = SimpleNamespace(**told)  # type: ignore[assignment]
    return module


def test_random_numbers_go_on_where_a_checkpoint_left_them() -> None:
    checkpoint: dict[str, Any] = {}
    module_of(1).on_save_checkpoint(checkpoint)
    expected = torch.rand(3)
    resumed = module_of(1)  # draws its own weights
    resumed.on_load_checkpoint(checkpoint)
    resumed.on_train_start()
    assert torch.equal(torch.rand(3), expected)


def test_a_checkpoint_without_random_numbers_is_refused() -> None:
    module = module_of(1, TrainerFn.VALIDATING)  # one that is fitted wants its arguments first
    module.on_load_checkpoint({})
    with pytest.raises(ValueError, match=f"has no {RANDOM_STATE}.*train anew"):
        module.on_train_start()


def test_a_training_that_draws_is_refused_in_several_processes() -> None:
    module_of(1).on_fit_start()
    with pytest.raises(ValueError, match="TeacherModule was started in 2 processes.*devices: 1"):
        module_of(2).on_fit_start()
