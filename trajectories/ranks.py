"""Which share of the items a process records, and on which device."""

from collections.abc import Mapping

import torch

LAUNCHERS = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))
"""Environment variables that tell a process its rank and the number of processes."""

LOCAL_RANKS = ("LOCAL_RANK", "SLURM_LOCALID")
"""Environment variables that tell a process its place on its machine."""


def place(rank: int | None, world: int | None, environment: Mapping[str, str]) -> tuple[int, int]:
    """This process's rank and the number of processes: as given, as launched, or alone.

    A SLURM array multiplies what runs in each of its tasks: task a of n, with w processes of which
    this is number r, is rank a w + r of n w.

    Args:
        rank: as given; None reads the environment.
        world: as given; None reads the environment.
        environment: `RANK` and `WORLD_SIZE` (torchrun, accelerate) or `SLURM_PROCID` and
            `SLURM_NTASKS`, and `SLURM_ARRAY_TASK_ID` with its `MIN`, `MAX` and `COUNT`.

    Raises:
        ValueError: only one of the two is known, the rank is not in `[0, world)`, or an array's
            numbers have gaps.
    """
    if (rank is None) != (world is None):
        raise ValueError(f"rank is {rank} and world is {world}; give both or neither.")
    if rank is None or world is None:
        found = [names for names in LAUNCHERS if all(name in environment for name in names)]
        rank, world = (int(environment[name]) for name in found[0]) if found else (0, 1)
        task, num_tasks = array_task(environment)
        rank, world = task * world + rank, num_tasks * world
    if not 0 <= rank < world:
        raise ValueError(f"rank is {rank} and world {world}, expected 0 <= rank < world.")
    return rank, world


def array_task(environment: Mapping[str, str]) -> tuple[int, int]:
    """Place of this SLURM array task among those of its array, and their number; (0, 1) outside.

    Raises:
        ValueError: the array's numbers have gaps that are not all alike, as in `--array=1,3,7`.
    """
    names = [f"SLURM_ARRAY_TASK_{name}" for name in ("ID", "MIN", "MAX", "COUNT")]
    if any(name not in environment for name in names):
        return 0, 1
    task, first, last, count = (int(environment[name]) for name in names)
    stride = (last - first) // max(count - 1, 1) or 1
    if first + stride * (count - 1) != last or (task - first) % stride:
        raise ValueError(
            f"this array has {count} tasks from {first} to {last}, expected evenly spaced numbers, "
            "as in --array=0-7; or give --rank and --world."
        )
    return (task - first) // stride, count


def own_device(environment: Mapping[str, str]) -> str:
    """The GPU of this process among those of its machine, the CPU where there is none."""
    if not torch.cuda.is_available():
        return "cpu"
    local = next((environment[name] for name in LOCAL_RANKS if name in environment), "0")
    return f"cuda:{int(local) % torch.cuda.device_count()}"
