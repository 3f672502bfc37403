"""Script: a warm parent that forks recorders and kills them; prints what the kills left as JSON.

Forking from a process that has imported everything makes the kills land in writes, not in imports.
Usage: recording_crash.py FOLDER. Every recording in FOLDER is complete at the end.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from recording_cases import small_header, trajectory

from foreseer.trajectories.files import manifest, shards, writer

ITEMS = 12
TOKENS = 8000
CASES = {item: trajectory(item, TOKENS) for item in range(ITEMS)}


def record_rest(folder: Path) -> None:
    with writer.RecordingWriter(folder, small_header()) as recorder:
        for item in sorted(set(CASES) - recorder.done()):
            recorder.write(item, CASES[item], {"seed": item})


def kill_oneself(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def half_line(path: Path, entry: manifest.Entry) -> None:
    with open(path, "ab", buffering=0) as file:
        file.write(manifest.canonical_json(vars(entry)).encode()[:40])
    kill_oneself()


STAGES: dict[str, tuple[ModuleType, str, Callable]] = {
    "before_rename": (os, "replace", kill_oneself),
    "before_folder_sync": (shards, "sync_folder", kill_oneself),
    "before_line": (writer, "append_entry", kill_oneself),
    "in_line": (writer, "append_entry", half_line),
}


def arm(stage: str) -> None:
    """Make this process kill itself when it reaches `stage` of writing the third item."""
    target, name, deadly = STAGES[stage]
    original: Callable = getattr(target, name)

    def call(*arguments: object) -> object:
        third = any("000002" in str(a) or getattr(a, "item", 0) == 2 for a in arguments)
        if stage == "before_folder_sync":
            third = (arguments[0] / "item-000002.safetensors").exists()  # type: ignore[operator]
        return (deadly if third else original)(*arguments)

    setattr(target, name, call)


def run_and_kill(folder: Path, delay_s: float | None, stage: str | None) -> bool:
    """Fork a recorder; True when it was killed rather than done."""
    reader, ready = os.pipe()
    child = os.fork()
    if child == 0:
        if stage:
            arm(stage)
        os.write(ready, b"x")
        record_rest(folder)
        os._exit(0)
    os.read(reader, 1)
    os.close(reader)
    os.close(ready)
    if delay_s is not None:
        time.sleep(delay_s)
        os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def left_behind(folder: Path) -> dict[str, int]:
    shards_there = set(folder.glob("shards/*/*.safetensors"))
    path = manifest.manifest_path(folder, 0)
    lines = path.read_bytes() if path.exists() else b""
    listed = {folder / json.loads(line)["file"] for line in lines.split(b"\n")[:-1]}
    return {
        "partial": len(list(folder.glob("shards/*/.*.partial"))),
        "unlisted": len(shards_there - listed),
        "half_line": int(not lines.endswith(b"\n") and lines != b""),
        "finished": len(listed),
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    report = {}
    for stage in STAGES:
        killed = run_and_kill(folder / stage, None, stage)
        report[stage] = {"killed": killed, **left_behind(folder / stage)}
        record_rest(folder / stage)
    start = time.perf_counter()
    run_and_kill(folder / "whole", None, None)
    longest_s = 0.5 * (time.perf_counter() - start)  # as slow as this machine is now
    delays = random.Random(0)
    kills = rounds = 0
    while kills < 10:  # a round ends when a recorder outran its killer
        round_folder = folder / f"random-{rounds}"
        while kills < 10 and run_and_kill(round_folder, delays.uniform(0, longest_s), None):
            report[f"random-{rounds}, kill {kills}"] = {"killed": True, **left_behind(round_folder)}
            kills += 1
        record_rest(round_folder)
        rounds += 1
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
