"""Episodes of the policy in the simulator, many at a time: success of a way to sample chunks.

Source of the interval: Wilson, J. Am. Stat. Assoc. 22 (1927).
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from action_head import ACTION, CHUNK
from tasks import LONGEST, World
from torch import Tensor

EXECUTED = 8  # actions of a chunk that are done before the next one is sampled
Sampler = Callable[[dict[str, Tensor], Tensor], Tensor]
"""Chunks `(B, 16, 4)` of observations, tasks and noise."""


def wilson(successes: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a rate.

    Args:
        successes: of the episodes.
        count: episodes.
        z: quantile of the normal distribution.
    """
    rate, spread = successes / count, z * z / count
    middle = (rate + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(rate * (1 - rate) / count + spread / (4 * count))
    return middle - half, middle + half


def successes(
    sample: Sampler, worlds: Sequence[World], task: int, first_seed: int, longest: int = LONGEST
) -> list[bool]:
    """Whether each of several episodes succeeds; they go side by side, a batch of chunks a tick.

    Objects and noise follow the seed alone, so that two samplers meet the same episodes.

    Args:
        sample: see `Sampler`.
        worlds: simulators of the task, one per episode.
        task: its number.
        first_seed: of the first episode; each takes the next.
        longest: steps after which an episode ends without success.
    """
    seen, noise = [], []
    for number, world in enumerate(worlds):
        world.env.seed(first_seed + number)
        seen.append(world.env.reset()[0])
        noise.append(torch.Generator().manual_seed(first_seed + number))
    done = [False] * len(worlds)
    for _ in range(0, longest, EXECUTED):
        live = [number for number, over in enumerate(done) if not over]
        if not live:
            break
        observation = torch.from_numpy(np.stack([seen[i] for i in live])).float()
        eps = torch.cat([torch.randn(1, CHUNK, ACTION, generator=noise[i]) for i in live])
        inputs = {"observation": observation, "task": torch.full((len(live),), task)}
        actions = sample(inputs, eps).clamp(-1, 1).numpy()
        for number, chosen in zip(live, actions, strict=True):
            for action in chosen[:EXECUTED]:
                seen[number], _, _, _, info = worlds[number].env.step(action)
                if info["success"]:
                    done[number] = True
                    break
    return done
