"""Demonstrations by the scripted experts, with noise on what is done: a file per task.

python examples/robot_policy/demonstrations.py --out runs/robot/demonstrations

What an expert would do is kept, and what is done differs from it by noise, so that the states
include those that an imperfect policy comes to (Laskey et al., arXiv 1703.09327). Tasks whose file
is there are left alone: the same command goes on.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from action_head import CHUNK
from safetensors.torch import load_file, save_file
from tasks import TASKS, Episode, World
from torch import Tensor

LARGEST_NOISE = 0.3


def chunks(actions: np.ndarray, length: int = CHUNK) -> np.ndarray:
    """Every action with those that follow it; the last one is repeated past the end.

    Args:
        actions: `(steps, 4)`.
        length: of a chunk.
    """
    steps = np.arange(len(actions))[:, None] + np.arange(length)
    return actions[steps.clip(max=len(actions) - 1)]


def demonstrate(task: int, episodes: int, first_seed: int) -> list[Episode]:
    """Successful episodes of a task's expert, each with its own strength of noise.

    Args:
        task: its number.
        episodes: how many are tried; the failed ones are left out.
        first_seed: of the first; each takes the next.
    """
    world = World(task)
    strengths = np.random.default_rng(first_seed).uniform(0, LARGEST_NOISE, episodes)
    tried = [
        world.episode(world.expert, first_seed + number, strength)
        for number, strength in enumerate(strengths)
    ]
    return [episode for episode in tried if episode.success]


def load_demonstrations(folder: Path) -> dict[str, Tensor]:
    """All pairs: `observation` (N, 39), `task` (N,) and `actions` (N, 16, 4)."""
    found = [load_file(folder / f"{name}.safetensors") for name in TASKS]
    tasks = [torch.full((len(pairs["observation"]),), i) for i, pairs in enumerate(found)]
    return {
        "observation": torch.cat([pairs["observation"] for pairs in found]),
        "actions": torch.cat([pairs["actions"] for pairs in found]),
        "task": torch.cat(tasks),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/robot/demonstrations"))
    parser.add_argument("--episodes", type=int, default=60, help="tried per task")
    parser.add_argument("--first-seed", type=int, default=0)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for task, name in enumerate(TASKS):
        file = given.out / f"{name}.safetensors"
        if file.exists():
            continue
        kept = demonstrate(task, given.episodes, given.first_seed)
        pairs = {
            "observation": torch.from_numpy(np.concatenate([e.observations for e in kept])),
            "actions": torch.from_numpy(np.concatenate([chunks(e.actions) for e in kept])),
        }
        unfinished = file.with_suffix(".unfinished")
        save_file(pairs, unfinished)
        unfinished.rename(file)
        print(f"{name}: {len(kept)} of {given.episodes} succeeded, {len(pairs['actions'])} pairs")


if __name__ == "__main__":
    main()
