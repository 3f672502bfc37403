"""Script: a warm parent that forks trainings, kills them, and starts them again.

Every training is the command with its shipped configuration. The command is read once; where it
would train, it forks: once to train whole, then for every kill, then once more to finish. So the
kills land in training, not in imports. Prints as JSON what was seen of every training.
Usage: training_crash.py FOLDER [NAME ...]
"""

import functools
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from training_crash_cases import CASES, Case, Kill, configuration, flat, make_sources, same

from foreseer.cli import main as foreseer
from foreseer.training import fit_report
from foreseer.training.disca import gan as disca_gan
from foreseer.training.plumbing import progress as callbacks

# What no two runs have in common, and a score that Lightning does not restore.
CLOCKS = ("fit_seconds", "time_elapsed", "}.current_score")
LOOPS = ".loops."  # counters of Lightning's, some of which it counts otherwise after a resumption
FIT = lightning.Trainer.fit


def die(**place: Any) -> None:
    """Tell where, and be killed."""
    Path("died.json").write_text(json.dumps(place))
    os.kill(os.getpid(), signal.SIGKILL)


def watch(kill: Kill | None) -> None:
    """Note where this process begins to train, and make it kill itself where it is told to."""
    now: dict[str, Any] = {}
    written: list[str] = []
    move, save = shutil.move, TorchCheckpointIO.save_checkpoint

    def before_batch(self: Any, trainer: Any, module: Any, batch: Any, index: int) -> None:
        if not now:
            place = {"epoch": trainer.current_epoch, "batch": index, "step": trainer.global_step}
            Path("begun.json").write_text(json.dumps(place))
        now.update(epoch=trainer.current_epoch, batch=index, step=trainer.global_step)
        if kill and kill.at == "batch" and (kill.epoch, kill.batch) == (now["epoch"], index):
            die(**now)

    def moved(source: str, target: str) -> Any:
        if not str(target).endswith(".ckpt"):
            return move(source, target)
        if kill and kill.at == "write" and len(written) == kill.epoch:
            die(**now, unfinished=os.path.getsize(source))
        written.append(target)
        return move(source, target)

    def saved(self: Any, *arguments: Any, **options: Any) -> None:
        save(self, *arguments, **options)
        if kill and kill.at == "saved" and len(written) == kill.epoch + 1:
            die(**now)

    ModelCheckpoint.on_train_batch_start = before_batch  # type: ignore[method-assign]
    shutil.move = moved  # type: ignore[assignment]
    TorchCheckpointIO.save_checkpoint = saved  # type: ignore[method-assign]


def forked(kill: Kill | None, trainer: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
    """Train in a fork; what became of it."""
    for name in ("begun.json", "died.json"):
        Path(name).unlink(missing_ok=True)
    start = time.perf_counter()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            watch(kill)
            FIT(trainer, *arguments, **options)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    if status and not killed:
        raise RuntimeError(f"training ended with status {status}")
    seen: dict[str, Any] = {"killed": killed, "seconds": time.perf_counter() - start}
    for name in ("begun", "died"):
        path = Path(f"{name}.json")
        seen[name] = json.loads(path.read_text()) if path.exists() else None
    last = newest(Path("runs"))
    state = None if last is None else load(last)
    seen["kept"] = state and {"step": state["global_step"], "epoch": state["epoch"]}
    return seen


def refused(trainer: Any, model: Any, *arguments: Any, **options: Any) -> str:
    """What another training says to the checkpoints of this one, in a fork."""
    child = os.fork()
    if child == 0:
        model._given = {**model._given, "anchors": "others"}
        try:
            FIT(trainer, model, *arguments, **options)
            told = "nothing"
        except ValueError as error:
            told = str(error)
        Path("refused.txt").write_text(told)
        os._exit(0)
    os.waitpid(child, 0)
    return Path("refused.txt").read_text()


def newest(runs: Path) -> Path | None:
    """The checkpoint the same command goes on from, if there is one."""
    found = sorted(runs.glob("*/*/*last.ckpt")) or sorted(runs.glob("*/*/*.ckpt"))
    return found[0] if found else None


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)


def compare() -> dict[str, Any]:
    """Which numbers of the last checkpoints differ, and which files are not in both."""
    whole, broken = Path("whole"), Path("runs")
    states = [flat(load(newest(folder))) for folder in (whole, broken)]  # type: ignore[arg-type]
    kept = [
        {
            n: v
            for n, v in s.items()
            if not n.startswith(LOOPS) and not any(clock in n for clock in CLOCKS)
        }
        for s in states
    ]
    names = sorted(kept[0].keys() | kept[1].keys())
    different = [n for n in names if n not in kept[0] or not same(kept[0][n], kept[1].get(n))]
    kinds = ("state_dict", "optimizer_states", "current_model_state")
    files = [
        {str(f.relative_to(folder)) for f in folder.glob("**/*") if "events" not in f.name}
        for folder in (whole, broken)
    ]
    tensors = [n for n in names if isinstance(kept[0].get(n), torch.Tensor)]
    compared = {kind: sum(name.startswith(f".{kind}.") for name in tensors) for kind in kinds}
    return {"different": different, "compared": compared, "files": sorted(files[0] ^ files[1])}


def train(case: Case) -> None:
    """Give the command; what was seen goes to `report.json`."""
    report: dict[str, Any] = {}

    @functools.wraps(FIT)  # the command reads its signature
    def fit(*arguments: Any, **options: Any) -> None:
        report["whole"] = [forked(None, *arguments, **options)]
        os.rename("runs", "whole")
        report["broken"] = [forked(kill, *arguments, **options) for kill in [*case.kills, None]]
        if case.resumes:
            report["refused"] = refused(*arguments, **options)

    lightning.Trainer.fit = fit  # type: ignore[method-assign, assignment]
    foreseer(case.words)
    Path("report.json").write_text(json.dumps(report | compare()))


def in_child(folder: Path, case: Case) -> dict[str, Any]:
    """Run the command in a fork of its own: it changes seeds, the folder and signals."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.chdir(folder)
            tempfile.tempdir = str(folder)
            log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            train(case)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    if os.waitpid(child, 0)[1]:
        raise RuntimeError(f"{folder}: {(folder / 'log.txt').read_text()[-6000:]}")
    return json.loads((folder / "report.json").read_text())


def main(folder: Path, names: list[str]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    disca_gan.CHANCE = 1.0  # type: ignore[misc]  # the adversary counts from the first update
    fit_report.plot_step_errors = lambda *_: None  # type: ignore[assignment]  # a second each
    clock = iter(range(10**6))  # a second a look: the budget is a number of steps
    callbacks.time = SimpleNamespace(monotonic=lambda: float(next(clock)))  # type: ignore
    sources = make_sources(folder)
    report: dict[str, Any] = {}
    for name in names or CASES:
        (folder / name).mkdir()
        (folder / name / "training.yaml").write_text(configuration(CASES[name], sources, folder))
        start = time.perf_counter()
        report[name] = in_child(folder / name, CASES[name])
        report[name]["seconds"] = time.perf_counter() - start
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
