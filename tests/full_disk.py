"""Script: two recorders on a small disk that somebody else fills once they have looked at it.

Mounts a file system of memory (as root, or inside `unshare -rm`), records there with the real
command until it is full, makes room and runs the same commands again. Prints what was seen as JSON.
Every command is a fork of this process, which has imported what they need.
Usage: full_disk.py FOLDER PIPELINE
"""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TextIO

import torch

from foreseer.cli import main as foreseer
from foreseer.integration.pipelines.load import load_pipeline
from foreseer.trajectories.recording import Recording

ITEMS = 40
SETTINGS = {
    "num_trajectories": ITEMS,
    "num_inference_steps": 8,
    "features": "full",
    "batch_size": 4,
    "taps": '["blocks.*","hidden","output"]',
    "world": 2,
}


def command(pipeline: str, out: Path, **more: object) -> list[str]:
    options = {"pipeline": pipeline, "out": out, **SETTINGS, **more}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return ["record", *words]


class Started(NamedTuple):
    child: int
    out: TextIO
    error: TextIO


def start(words: list[str]) -> Started:
    """A command in a fork of its own, as an interpreter would run it."""
    (out, out_of_child), (error, error_of_child) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(out_of_child, 1)
        os.dup2(error_of_child, 2)
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        code: int | str | None = 0
        try:
            foreseer(words)
        except SystemExit as stop:
            code = stop.code
            if isinstance(code, str):
                print(code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(1 if isinstance(code, str) else code or 0)
    os.close(out_of_child)
    os.close(error_of_child)
    return Started(child, os.fdopen(out), os.fdopen(error))


def run(commands: list[list[str]], then: Callable[[], None] = lambda: None) -> list[dict]:
    """Run at the same time; `then` is called once all have said what they need."""
    started = [start(words) for words in commands]
    said = [each.out.readline() for each in started]
    then()
    found = []
    for each, first in zip(started, said, strict=True):
        with each.out, each.error:
            out, error = first + each.out.read(), each.error.read()
        code = os.waitstatus_to_exitcode(os.waitpid(each.child, 0)[1])
        found.append({"code": code, "out": out, "error": error.strip().splitlines()[-1:]})
    return found


def main(folder: Path, pipeline: str) -> None:
    torch.set_num_threads(1)
    load_pipeline(pipeline)  # imports what every fork would
    one = folder / "one"
    run([command(pipeline, one, num_trajectories=2, rank=0, world=1)])
    each = next(iter(Recording(one).entries.values())).bytes
    disk = folder / "disk"
    disk.mkdir()
    size = int(ITEMS * each * 1.5)
    mounted = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
    if subprocess.run(mounted, capture_output=True).returncode:
        print(json.dumps({"mounted": False}))
        return
    try:
        out = disk / "run"
        commands = [command(pipeline, out, rank=rank) for rank in range(2)]

        def fill() -> None:
            left = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - 5 * each
            (disk / "filler").write_bytes(b"\0" * left)

        full = run(commands, fill)
        recording = Recording(out)
        seen = {
            "mounted": True,
            "runs": full,
            "finished": len(recording),
            "damaged": recording.verify(),
            "free_bytes": os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize,
            "bytes_each": each,
            "left": [p.name for p in out.glob("shards/*/.*")],
            "unlisted": len(list(out.glob("shards/*/item-*"))) - len(recording),
        }
        (disk / "filler").unlink()
        seen["resumed"] = run(commands)
        seen["items"], seen["damaged_after"] = Recording(out).items, Recording(out).verify()
        print(json.dumps(seen))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
