"""Script: two recorders of one folder or URL, killed again and again; prints what was seen as JSON.

A warm parent forks them, so that kills land in writes and not in imports. A round is over when both
ranks are done; then its recording is compared with one that nobody disturbed.
Usage: two_recorders.py FOLDER NUM_KILLS SEED folder|url
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from recording_cases import small_header, trajectory

from foreseer.trajectories.files.writer import open_writer
from foreseer.trajectories.recording import Recording

ITEMS = 16
WORLD = 2
CASES = {item: trajectory(item, tokens=4000) for item in range(ITEMS)}


def record_share(place: str | Path, rank: int) -> None:
    with open_writer(place, small_header(), rank) as recorder:
        for item in sorted(set(range(rank, ITEMS, WORLD)) - recorder.done()):
            recorder.write(item, CASES[item], {"seed": item})


def start(place: str | Path, rank: int) -> int:
    child = os.fork()
    if child == 0:
        record_share(place, rank)
        os._exit(0)
    return child


def left_behind(folder: Path) -> dict[str, int]:
    """What is in a folder that no finished line names."""
    lines = [path.read_bytes() for path in folder.glob("manifest.*.jsonl")]
    whole = [line for content in lines for line in content.split(b"\n")[:-1]]
    listed = {json.loads(line)["file"] for line in whole}
    shards = {p.relative_to(folder).as_posix() for p in folder.glob("shards/*/item-*.safetensors")}
    partial = [*folder.glob("shards/*/.*.partial"), *folder.glob(".*.partial")]
    return {
        "partial": len(partial),
        "unlisted": len(shards - listed),
        "half_line": sum(not content.endswith(b"\n") for content in lines if content),
        "finished": len(listed),
    }


def disturb(place: str | Path, folder: Path, delays: random.Random, longest_s: float) -> list[dict]:
    """Record one round with kills at random times; what each kill left."""
    seen = []
    running = {start(place, rank): rank for rank in range(WORLD)}
    while running:
        victim = delays.choice(sorted(running))
        time.sleep(delays.uniform(0, longest_s))
        os.kill(victim, signal.SIGKILL)
        rank = running.pop(victim)
        if os.WIFSIGNALED(os.waitpid(victim, 0)[1]):
            seen.append({"rank": rank, "beside": len(running), **left_behind(folder)})
            running[start(place, rank)] = rank
    return seen


def compare(place: str | Path, undisturbed: dict) -> list[str]:
    """What is wrong with a finished round; empty when nothing is."""
    recording = Recording(place)
    found = {item: (e.xxh3, e.bytes, e.meta) for item, e in recording.entries.items()}
    problems = recording.verify()
    if found != undisturbed:
        problems.append(f"items {sorted(found)} differ from the undisturbed recording")
    lines = sum(content.count(b"\n") for content in recording.store.manifests().values())
    return problems + ([f"{lines} lines"] if lines != ITEMS else [])


def main(folder: Path, num_kills: int, seed: int, kind: str) -> None:
    torch.set_num_threads(1)
    os.environ["FORESEER_CACHE"] = str(folder / "cache")
    begin = time.perf_counter()
    for rank in range(WORLD):
        record_share(folder / "whole", rank)
    longest_s = 0.6 * (time.perf_counter() - begin)
    entries = Recording(folder / "whole").entries
    undisturbed = {item: (e.xxh3, e.bytes, e.meta) for item, e in entries.items()}
    delays = random.Random(seed)
    kills: list[dict] = []
    problems: list[str] = []
    rounds = 0
    while len(kills) < num_kills:
        there = folder / f"round-{rounds}"
        place = there if kind == "folder" else f"file://{there}"
        kills += disturb(place, there, delays, longest_s)
        problems += compare(place, undisturbed)
        rounds += 1
    left = [there for there in folder.glob("round-*/shards/*/.*.partial")]
    print(json.dumps({"rounds": rounds, "kills": kills, "problems": problems, "left": len(left)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
