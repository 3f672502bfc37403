"""Lists of anchors for the readouts of both bundled models, compared with those of today.

    python benchmarks/readout_lists.py --hosts '[fashion_dit]' --budgets '[8]'

Tried are the readout's list of today, that with a longer first segment, those searched for Euler
and for lines through two anchors, and the times of a fitted `bns`, where learned_solvers.py has
one. Each is fitted and measured on trajectories of the recording that no fit of the tables is of;
what was tried stands in runs/readout/<host>/tried.json, the best in <host>_searched.json.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from readout import BUDGETS, FITTED_ON, HOSTS, LEARNED, ROOT, lists, recording

from foreseer.evaluation.learned_solver import LearnedSolver
from foreseer.evaluation.metrics import paired
from foreseer.integration.pipelines.load import load_pipeline
from foreseer.training.readout.readout_runs import QuietFit, run_fit
from foreseer.trajectories.datamodule import ItemsDataModule
from foreseer.trajectories.recording import Recording

BEGUN = ("euler|none", "taylor_1|output")
"""Rivals whose searched lists are tried too."""


class Given(ItemsDataModule):
    """Three of four given trajectories to fit on, the others to measure on."""

    def __init__(self, folder: str, items: Sequence[int]) -> None:
        super().__init__(folder)
        self.items = items

    def setup(self, stage: str | None = None) -> None:
        """Every fourth is held out."""
        self.val_items = list(self.items[3::4])
        self.train_items = [item for item in self.items if item not in self.val_items]


def compare(
    hosts: Sequence[str] = tuple(HOSTS),
    budgets: Sequence[int] = BUDGETS,
    num_samples: int = 128,
    tried: Sequence[Sequence[int]] = (),
) -> None:
    """Compare the readout's lists with others, and keep the best.

    Args:
        hosts: bundled models.
        budgets: network evaluations.
        num_samples: trajectories.
        tried: lists of those lengths, instead of those above.
    """
    for host in hosts:
        known = json.loads(lists(host).read_text())
        pipe = load_pipeline(f"zoo:{host}")
        source = Recording(recording(host))
        items = source.items[FITTED_ON : FITTED_ON + num_samples]
        for budget in budgets:
            own = tuple(known[f"readout|output|{budget}"])
            others = [tuple(each) for each in tried if len(each) == budget]
            others = others or candidates(own, known, source.header.sigmas, LEARNED / host)
            asked = (own, *others)
            best = best_list(pipe, recording(host), items, asked, ROOT / host / "tried.json")
            known[f"readout|output|{budget}"] = list(best)
            lists(host).write_text(json.dumps(known, indent=1))


def candidates(
    own: Sequence[int], known: dict[str, Any], sigmas: Sequence[float], solvers: Path
) -> list[tuple[int, ...]]:
    """Lists to compare the readout's with: all that have as many different anchors.

    Args:
        own: the readout's.
        known: searched lists of rivals, `method|tap|evaluations` to anchors.
        sigmas: flow time of every step.
        solvers: folder of fitted learned solvers.
    """
    budget, grid = len(own), torch.tensor(sigmas)
    found = [stretched(own, by) for by in (1, 2)]
    found += [tuple(known[f"{name}|{budget}"]) for name in BEGUN if f"{name}|{budget}" in known]
    for path in sorted(solvers.glob(f"bns_{budget}_free_gn_0_*.json")):
        times = LearnedSolver.load(path).solver.times
        found.append(tuple((grid[None] - times[:, None]).abs().argmin(1).tolist()))
    return [each for each in dict.fromkeys(found) if (each[0], len(set(each))) == (0, budget)]


def best_list(
    pipe: Any,
    recording: str,
    items: Sequence[int],
    asked: Sequence[tuple[int, ...]],
    log: Path,
) -> tuple[int, ...]:
    """The list whose readout has the least error on those trajectories it was not fitted on.

    Args:
        pipe: the recorded pipeline.
        recording: folder of the recording.
        items: trajectories; every fourth is held out.
        asked: lists of one length, the one that others are compared with first.
        log: file of the errors of every list, in which those of earlier calls are looked up.
    """
    found = json.loads(log.read_text()) if log.exists() else {}
    errors = found.setdefault(f"{len(asked[0])} of {len(items)}", {})
    names = [" ".join(map(str, anchors)) for anchors in asked]
    for name, anchors in zip(names, asked, strict=True):
        if name not in errors:
            module = QuietFit(recording, "", list(anchors))
            run_fit(module, pipe, Given(recording, items))
            assert module.val_errors is not None  # some were held out
            errors[name] = module.val_errors.tolist()
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text(json.dumps(found))
        gap = paired(torch.tensor(errors[names[0]]), torch.tensor(errors[name]))
        print(f"{name}: {gap.mean:+.2f} ({gap.low:+.2f} to {gap.high:+.2f}) dB better", flush=True)
    best = min(errors, key=lambda name: sum(errors[name]))
    return tuple(map(int, best.split()))


def stretched(anchors: Sequence[int], by: int) -> tuple[int, ...]:
    """A list with a longer first segment, those behind it shortened evenly; the last one stays."""
    _, first, *_, last = anchors
    share = (last - first - by) / (last - first)
    return (0, *(round(last - (last - anchor) * share) for anchor in anchors[1:]))


if __name__ == "__main__":
    auto_cli(compare)
