"""Six tasks of Meta-World without a picture: what the robot sees, does, and whether it succeeded.

Source: McLean et al., arXiv 2505.11289 (Meta-World+); `pip install metaworld==3.1.1`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

TASKS = (
    "reach",
    "button-press-topdown",
    "door-open",
    "drawer-open",
    "window-open",
    "push",
)
"""By number: the one that the head is told."""

LONGEST = 300  # steps; the experts need 50 to 110


@dataclass(frozen=True)
class Episode:
    """What happened between a reset and success, or the last step.

    Args:
        observations: `(steps, 39)` before every action.
        actions: `(steps, 4)` that were asked for, in [-1, 1].
        success: whether the task was done.
    """

    observations: np.ndarray
    actions: np.ndarray
    success: bool


class World:
    """The simulator of one task; places of the objects and of the goal follow the seed of a reset.

    Args:
        task: its number in `TASKS`.
    """

    def __init__(self, task: int) -> None:
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE
        from metaworld.policies import ENV_POLICY_MAP

        name = f"{TASKS[task]}-v3"
        self.env: Any = ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{name}-goal-observable"](seed=0)
        self.env._freeze_rand_vec, self.env.seeded_rand_vec = False, True
        self.expert: Callable[[np.ndarray], np.ndarray] = ENV_POLICY_MAP[name]().get_action

    def episode(
        self,
        act: Callable[[np.ndarray], np.ndarray],
        seed: int,
        noise: float = 0.0,
        longest: int = LONGEST,
    ) -> Episode:
        """One episode.

        Args:
            act: the action `(4,)` at an observation `(39,)`.
            seed: of the objects' places and of the noise.
            noise: standard deviation of what is added to the action that is done, not to the one
                that is kept.
            longest: steps after which it ends without success.
        """
        self.env.seed(seed)
        random = np.random.default_rng(seed)
        seen, _ = self.env.reset()
        observations, actions, success = [], [], False
        for _ in range(longest):
            action = np.clip(act(seen), -1, 1).astype(np.float32)
            observations.append(seen.astype(np.float32))
            actions.append(action)
            done = np.clip(action + noise * random.standard_normal(4), -1, 1)
            seen, _, _, _, info = self.env.step(done.astype(np.float32))
            if info["success"]:
                success = True
                break
        return Episode(np.stack(observations), np.stack(actions), success)
