"""Script: two recorders on a small disk that somebody else fills once they have looked at it.

Mounts a file system of memory (as root, or inside `unshare -rm`), records there with the real
command until it is full, makes room and runs the same commands again. Prints what was seen as JSON.
Usage: full_disk.py FOLDER PIPELINE
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

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
    return [sys.executable, "-m", "foreseer", "record", *words]


def run(commands: list[list[str]], then: Callable[[], None] = lambda: None) -> list[dict]:
    """Run at the same time; `then` is called once all have said what they need."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    started = [
        subprocess.Popen(
            each, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        for each in commands
    ]
    said = [process.stdout.readline() for process in started if process.stdout]
    then()
    ended = [process.communicate() for process in started]
    return [
        {"code": process.returncode, "out": first + out, "error": error.strip().splitlines()[-1:]}
        for process, first, (out, error) in zip(started, said, ended, strict=True)
    ]


def main(folder: Path, pipeline: str) -> None:
    from foreseer.trajectories.recording import Recording

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
