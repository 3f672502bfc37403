"""`foreseer verify`: whether a recording is intact, and how to get there."""

from pathlib import Path

from foreseer.trajectories.files.repair import DAMAGED, leftovers, repair
from foreseer.trajectories.files.storage import is_url
from foreseer.trajectories.record_command import megabytes
from foreseer.trajectories.recording import Recording


def verify_command(recording: str, repaired: bool = False) -> None:
    """Compare every shard with its hash and print what is damaged, repairing it first if asked.

    Raises:
        SystemExit: with code 1 when something is damaged.
    """
    if repaired:
        changes = repair(recording)
        for change in changes:
            print(change)
        print(f"changes made: {len(changes)}")
        if (aside := Path(recording, DAMAGED)).exists():
            print(f"what was taken out lies in {aside}")
    opened = Recording(recording)
    problems = opened.verify()
    for problem in problems:
        print(problem)
    total = sum(entry.bytes for entry in opened.entries.values())
    print(f"{len(problems)} of {len(opened)} trajectories damaged, {megabytes(total)} read")
    left = [] if is_url(recording) else leftovers(recording, opened.entries.values())
    if left:
        print(
            f"{len(left)} files belong to no finished trajectory: --repair adopts or removes them"
        )
    if problems:
        raise SystemExit(1)
