"""Script: hundreds of pipeline calls in one process, each compared with the call in a fresh one.

Usage: soak.py [--calls 200] [--interpreters 3] [--seed 0]; prints what happened as JSON. A mismatch
or a leak is listed there, with the call that showed it.

Fresh means: in a process that has imported what the soak imports and done nothing else. An
interpreter start takes seconds, most of it imports, so one process is set aside right after the
imports, before any pipeline is built, and forks a child for every different call. What imports
leave behind is the same in the child and in a new interpreter, and with one torch thread there is
nothing that a fork would lose: no pool of threads, no kernel in use, no random number drawn. A few
calls of different kinds are compared with truly new interpreters as well (`--fresh`).
"""

import argparse
import collections
import gc
import json
import multiprocessing
import os
import random
import resource
import subprocess
import sys
import warnings
from dataclasses import asdict, replace
from multiprocessing.connection import Connection
from typing import Any

import torch
from soak_cases import (
    ABORTS,
    SHARING,
    SLOTS,
    Call,
    Predictors,
    build,
    draw,
    fresh,
    grid,
    outcome,
    setups,
)
from torch import Tensor, nn

from foreseer.evaluation.verify import footprint
from foreseer.integration.host.expert import Expert
from foreseer.integration.host.hook import ReplacedMethod
from foreseer.integration.host.proof import facts_of
from foreseer.integration.session import Session
from foreseer.predictors.base import History
from foreseer.predictors.partition import Partition

Grids = dict[str, tuple[float, ...]]


# ---------------------------------------------------------------------------------- fresh processes


def serve(asked: Connection) -> None:
    """Answer every question in a child of its own until the pipe is closed."""
    while True:
        try:
            question = asked.recv()
        except EOFError:
            os._exit(0)
        child = os.fork()
        if child == 0:
            try:
                answer = grid(question) if isinstance(question, str) else fresh(*question)
            except BaseException as error:
                answer = {"failed": f"{type(error).__name__}: {error}"}
            asked.send(answer)
            os._exit(0)
        os.waitpid(child, 0)


class FreshProcesses:
    """What calls give in fresh processes, each asked once. To be made before anything is built."""

    def __init__(self) -> None:
        ours, theirs = multiprocessing.Pipe()
        self.pid = os.fork()
        if self.pid == 0:
            ours.close()
            serve(theirs)
        theirs.close()
        self.pipe = ours
        self.known: dict[Call, dict[str, str]] = {}
        self.grids: Grids = {slot: self._ask(slot) for slot in SLOTS}

    def _ask(self, question: Any) -> Any:
        self.pipe.send(question)
        return self.pipe.recv()

    def outcome(self, wanted: Call) -> dict[str, str]:
        if wanted not in self.known:
            self.known[wanted] = self._ask((wanted, self.grids))
        return self.known[wanted]

    def close(self) -> None:
        self.pipe.close()
        os.waitpid(self.pid, 0)


def in_a_new_interpreter(wanted: Call, grids: Grids) -> dict[str, str]:
    """The outcome of a call in an interpreter started for it."""
    question = json.dumps({"call": asdict(wanted), "grids": grids})
    command = [sys.executable, __file__, "--fresh", question]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def answer(question: str) -> None:
    """What `in_a_new_interpreter` started this interpreter for."""
    told = json.loads(question)
    stop = told["call"]["stop"]
    listed = {"samples": tuple(told["call"]["samples"]), "stop": stop and tuple(stop)}
    print(json.dumps(fresh(Call(**{**told["call"], **listed}), told["grids"])))


# ------------------------------------------------------------------------------------------- growth


def counted() -> dict[str, int]:
    """Live objects of the kinds that a session is made of, and live tensors and their bytes."""
    gc.collect()
    found: collections.Counter[str] = collections.Counter()
    kinds = {
        Session: "sessions",
        Expert: "experts",
        ReplacedMethod: "methods",
        History: "histories",
    }
    for each in gc.get_objects():
        kind = type(each)
        for known, name in kinds.items():
            found[name] += issubclass(kind, known)
        if issubclass(kind, Tensor):
            found["tensors"] += 1
            found["bytes"] += each.untyped_storage().nbytes()
    return dict(found)


def kept(value: Any) -> list[Tensor]:
    """Tensors in a predictor's own tables, which grow with every new list of anchors and dtype."""
    if isinstance(value, Tensor):
        return [value] if value._base is None else [value, value._base]
    if isinstance(value, nn.Module | Partition):
        value = {k: v for k, v in vars(value).items() if k not in ("_parameters", "_buffers")}
    if isinstance(value, dict):
        value = list(value.values())
    return [t for part in value for t in kept(part)] if isinstance(value, list | tuple) else []


def resident_mib() -> float:
    """Memory of this process that lies in RAM."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


# --------------------------------------------------------------------------------------------- soak


class Soak:
    """The pipelines under way, what is attached to them and what was found.

    Args:
        processes: what calls give in fresh processes.
        seed: of everything random.
    """

    def __init__(self, processes: FreshProcesses, seed: int) -> None:
        self.processes = processes
        self.rng = random.Random(seed)
        self.pipes = build("dit") | build("sd3") | build(SHARING[0])
        self.predictors = Predictors(processes.grids)
        self.attached: dict[str, tuple[str, Session]] = {}
        self.counts: collections.Counter[str] = collections.Counter()
        self.aborted: collections.Counter[str] = collections.Counter()
        self.completed: collections.Counter[str] = collections.Counter()
        self.faults: list[str] = []
        for slot in SLOTS:
            self._warm_up(slot)
        self.footprints = {slot: footprint(pipe) for slot, pipe in self.pipes.items()}
        self.before = self.live()

    def _warm_up(self, slot: str) -> None:
        """Make what lasts: every predictor, and what a pipeline's first calls leave on it."""
        outcome(self.pipes[slot], None, Call(slot, None))
        for setup in setups(slot):
            self.predictors.attach(setup, slot, self.pipes[slot]).detach()

    def live(self) -> dict[str, int]:
        """Live objects, without the predictors' tables and the pipelines' and schedulers' own."""
        found = counted()
        own = [t for made in self.predictors.made.values() for t in kept(made)]
        for pipe in self.pipes.values():  # the timesteps of the latest call, whatever it was
            for value in (*vars(pipe).values(), *vars(pipe.scheduler).values()):
                own += kept(value) if isinstance(value, Tensor) else []
            for layout in facts_of(pipe.transformer).layouts.values():  # known once and for all
                own += [layout.tokens, layout.elements]
        different = {id(t): t for t in own}
        found["tensors"] -= len(different)
        found["bytes"] -= sum(t.untyped_storage().nbytes() for t in different.values())
        return found

    def detach(self, slot: str) -> None:
        """Take off what is attached and look for what it left."""
        setup, session = self.attached.pop(slot)
        session.detach()
        del session
        self.counts["detached"] += 1
        left = footprint(self.pipes[slot])
        if left != self.footprints[slot] or "forward" in vars(self.pipes[slot].transformer):
            self.faults.append(f"{setup} left something on {slot}")
        found = self.live()
        if found.get("sessions", 0) != len(self.attached):
            self.faults.append(f"{setup} on {slot} left {found} with {len(self.attached)} attached")
        if not self.attached:
            self.counts["quiet"] += 1
            if found != self.before:
                self.faults.append(f"{setup} on {slot}: {found} live, before {self.before}")

    def swap(self, slot: str) -> None:
        """Attach something else, or nothing."""
        before = self.attached.get(slot, ("nothing",))[0]
        for other in SHARING if slot in SHARING else (slot,):
            if other in self.attached:
                self.detach(other)
        after = self.rng.choice([None, *setups(slot)])
        if after is not None:
            self.attached[slot] = after, self.predictors.attach(after, slot, self.pipes[slot])
            self.counts["attached"] += 1
        self.counts["swaps"] += before != (after or "nothing")

    def call(self, slot: str) -> None:
        """One call, compared with a fresh process's."""
        setup, session = self.attached.get(slot, (None, None))
        wanted = draw(self.rng, slot, setup)
        self.counts["calls"] += 1
        try:
            found = outcome(self.pipes[slot], session, wanted)
        except tuple(ABORTS.values()):
            self.aborted[wanted.stop[0]] += 1
            return
        if wanted.stop and wanted.stop[0] in ABORTS:
            wanted = replace(wanted, stop=None)  # it was over before it was to be broken off
        expected = self.processes.outcome(wanted)
        if found != expected:
            self.faults.append(f"call {self.counts['calls']}, {wanted}: {found}, not {expected}")
        if "image" not in found:
            self.counts["refused"] += 1
            return
        self.counts["completed"] += 1
        self.counts["interrupted"] += wanted.stop is not None
        self.completed[f"{slot} {setup}"] += 1

    def turn(self) -> None:
        """What happens before a call: something is exchanged, taken off, or nothing at all."""
        slot, chance = self.rng.choice(SLOTS), self.rng.random()
        if chance < 0.35:
            self.swap(slot)
        elif chance < 0.42:
            self.quiet()
        elif chance < 0.5 and self.attached:
            self.detach(self.rng.choice(sorted(self.attached)))
        elif self.attached:
            slot = self.rng.choice(sorted(self.attached))  # once more with what is there
        self.call(slot)

    def quiet(self) -> None:
        """Take off everything, in any order."""
        for slot in self.rng.sample(sorted(self.attached), len(self.attached)):
            self.detach(slot)


def soak(calls: int, seed: int, interpreters: int) -> dict[str, Any]:
    """The account of a soak."""
    gc.collect()
    gc.freeze()  # what was imported is not looked through again
    processes = FreshProcesses()
    under_way = Soak(processes, seed)
    warm = 0.0
    for number in range(calls):
        under_way.turn()
        if number == calls // 4:
            warm = resident_mib()
    under_way.quiet()
    after = under_way.live()
    kinds = {(wanted.slot, wanted.setup): wanted for wanted in processes.known}
    checked = [kinds[kind] for kind in sorted(kinds, key=str) if kind[1] in ("gram", None, "speca")]
    checked = random.Random(seed).sample(checked, min(interpreters, len(checked)))
    new = [in_a_new_interpreter(wanted, processes.grids) for wanted in checked]
    agreeing = sum(a == processes.known[b] for a, b in zip(new, checked, strict=True))
    processes.close()
    return {
        **under_way.counts,
        "aborted": dict(sorted(under_way.aborted.items())),
        "distinct_configurations": len(processes.known),
        "distinct_setups_completed": len(under_way.completed),
        "new_interpreters_agreeing": agreeing,
        "growth": {name: after[name] - under_way.before[name] for name in after},
        "resident_mib": {"quarter": round(warm, 1), "end": round(resident_mib(), 1)},
        "faults": under_way.faults,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--interpreters", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    warnings.simplefilter("ignore")
    if given.fresh:
        answer(given.fresh)
    else:
        print(json.dumps(soak(given.calls, given.seed, given.interpreters), indent=1))


if __name__ == "__main__":
    main()
