"""Script: two recorders whose shares fit a small disk singly and fill it together.

Mounts a file system of memory (as root, or inside `unshare -rm`), records there with the real
command until it is full, makes room and runs the same commands again. Prints what was seen as JSON.
Usage: full_disk.py FOLDER PIPELINE
"""

import json
import os
import subprocess
import sys
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


def run(commands: list[list[str]]) -> list[dict]:
    """Run at the same time; exit code and words of each."""
    started = [
        subprocess.Popen(each, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for each in commands
    ]
    ended = [process.communicate() for process in started]
    return [
        {"code": process.returncode, "out": out, "error": error.strip().splitlines()[-1:]}
        for process, (out, error) in zip(started, ended, strict=True)
    ]


def main(folder: Path, pipeline: str) -> None:
    from foreseer.trajectories.recording import Recording

    one = folder / "one"
    run([command(pipeline, one, num_trajectories=2, rank=0, world=1)])
    each = next(iter(Recording(one).entries.values())).bytes
    disk = folder / "disk"
    disk.mkdir()
    size = int(ITEMS * each * 0.7)  # of one share 1.4 times what it needs
    mounted = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
    if subprocess.run(mounted, capture_output=True).returncode:
        print(json.dumps({"mounted": False}))
        return
    try:
        out = disk / "run"
        commands = [command(pipeline, out, rank=rank) for rank in range(2)]
        full = run(commands)
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
        again = [*mounted[:3], "-o", f"remount,size={size * 2}", "tmpfs", str(disk)]
        subprocess.run(again, check=True)
        seen["resumed"] = run(commands)
        seen["items"], seen["damaged_after"] = Recording(out).items, Recording(out).verify()
        print(json.dumps(seen))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
