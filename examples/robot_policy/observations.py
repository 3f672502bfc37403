"""Observations to record, choose and judge on, none of which the head was trained on.

python examples/robot_policy/observations.py --out examples/robot_policy/observations.safetensors

Of episodes of the experts with noise, every split with seeds of its own; few of each episode.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from demonstrations import demonstrate
from safetensors.torch import load_file, save_file
from tasks import TASKS
from torch import Tensor

SPLITS = {"fit": (1020, 10_000), "choose": (126, 20_000), "judge": (258, 30_000)}
"""Observations of every split, and the seed of its first episode."""

PER_EPISODE = 8
OBSERVATIONS = Path(__file__).parent / "observations.safetensors"


def load_observations(split: str, file: Path = OBSERVATIONS) -> dict[str, Tensor]:
    """`observation` (N, 39), `task` (N,) and the noise `eps` (N, 16, 4) of a split.

    Args:
        split: `fit`, `choose` or `judge`.
        file: where they are.
    """
    from action_head import ACTION, CHUNK

    found = load_file(file)
    observation, task = found[f"{split}/observation"], found[f"{split}/task"].long()
    generator = torch.Generator().manual_seed(SPLITS[split][1])
    eps = torch.randn(len(task), CHUNK, ACTION, generator=generator)
    return {"observation": observation, "task": task, "eps": eps}


def drawn(task: int, count: int, first_seed: int) -> Tensor:
    """Observations of a task, at most `PER_EPISODE` of an episode.

    Args:
        task: its number.
        count: how many.
        first_seed: of the episodes.
    """
    random = np.random.default_rng(first_seed + task)
    kept: list[np.ndarray] = []
    for episode in demonstrate(task, -(-count // PER_EPISODE) + 4, first_seed):
        some = random.permutation(len(episode.observations))[:PER_EPISODE]
        kept.extend(episode.observations[some])
    return torch.from_numpy(np.stack(kept[:count]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OBSERVATIONS)
    given = parser.parse_args()
    found = {}
    for split, (count, seed) in SPLITS.items():
        each = count // len(TASKS)
        rows = torch.cat([drawn(task, each, seed) for task in range(len(TASKS))])
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        found[f"{split}/observation"] = rows[order]
        tasks = torch.arange(len(TASKS)).repeat_interleave(each)
        found[f"{split}/task"] = tasks[order].to(torch.uint8)
        print(f"{split}: {len(rows)} observations")
    save_file(found, given.out)


if __name__ == "__main__":
    main()
