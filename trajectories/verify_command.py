"""`foreseer verify`: whether a recording is intact."""

from .record_command import megabytes
from .recording import Recording


def verify_command(recording: str) -> None:
    """Compare every shard with its hash and print what is damaged.

    Raises:
        SystemExit: with code 1 when something is damaged.
    """
    opened = Recording(recording)
    problems = opened.verify()
    for problem in problems:
        print(problem)
    total = sum(entry.bytes for entry in opened.entries.values())
    print(f"{len(problems)} of {len(opened)} trajectories damaged, {megabytes(total)} read")
    if problems:
        raise SystemExit(1)
