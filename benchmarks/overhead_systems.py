"""The systems of `overhead.py`: the host, each cache attached to a copy of it, what a skip runs."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import cache_dit
import numpy as np
import torch
from cache_dit import DBCacheConfig, TaylorSeerCalibratorConfig
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import FirstBlockCacheConfig, MagCacheConfig
from diffusers.hooks.hooks import StateManager
from overhead_host import GUIDANCE
from torch import Tensor, nn

from foreseer.checkpoints.spec import PredictorSpec
from foreseer.integration.forecasting import attach
from foreseer.integration.host.clock import flow_sigmas
from foreseer.integration.host.fingerprint import host_fingerprint
from foreseer.integration.schedule import diffusers_interval
from foreseer.predictors.base import Predictor
from foreseer.predictors.linear import L2P
from foreseer.predictors.rules import Reuse, Taylor

NUM_BLOCKS = 12
NUM_STEPS = 9
ANCHORS = diffusers_interval(NUM_STEPS)  # 0 1 2 4: what TaylorSeerCache computes by default
L2P_STEPS = 13
L2P_ANCHORS = (0, 1, 2, 3, 4, 5, 6, 8)
EVERY_STEP = (0, 1, 2, 3)
ALWAYS_SKIP = 0.99  # from 1.0 on cache-dit leaves out the comparison that users pay for

Ran = tuple[int, int]  # blocks and attentions that ran in one call of the transformer
FULL: Ran = (NUM_BLOCKS, NUM_BLOCKS)


@dataclass
class System:
    """One line of the table.

    Args:
        name: what is measured.
        tap: what it forecasts or reuses.
        attach: puts it on a pipeline; returns what gives the bytes it holds.
        num_steps: steps of a run.
        anchors: steps at which all blocks run.
        skipped: blocks and attentions that run at the other steps.
        steps: steps whose time counts; None takes those after the last anchor.
    """

    name: str
    tap: str
    attach: Callable[[Any], Callable[[], int]]
    num_steps: int = NUM_STEPS
    anchors: Sequence[int] = ANCHORS
    skipped: Ran = (0, 0)
    steps: Sequence[int] | None = None
    state_bytes: int = 0
    seconds: list[float] = field(default_factory=list)  # median of each round
    call_seconds: list[float] = field(default_factory=list)  # likewise, the transformer's call only

    @property
    def timed(self) -> Sequence[int]:
        """The steps whose time counts."""
        return self.steps or range(self.anchors[-1] + 1, self.num_steps)

    def expected(self, step: int) -> Ran:
        """What has to run at a step."""
        return FULL if step in self.anchors else self.skipped


def systems() -> list[System]:
    """The full step first, then foreseer, then diffusers and cache-dit."""
    rules: dict[str, Predictor] = {"reuse": Reuse(), "taylor_1": Taylor(1), "taylor_2": Taylor(2)}
    every = {"num_steps": len(EVERY_STEP), "anchors": EVERY_STEP, "steps": EVERY_STEP[1:]}
    found = [
        System("full step", "-", lambda pipe: lambda: 0, **every),
        System("foreseer anchor step", "hidden", ours(Reuse(), "hidden", EVERY_STEP), **every),
    ]
    for tap in ("hidden", "output"):
        found += [System(f"foreseer {n}", tap, ours(rule, tap)) for n, rule in rules.items()]
        found.append(System("foreseer l2p", tap, l2p(tap), L2P_STEPS, L2P_ANCHORS))
    found.append(System("foreseer taylor_1", "residual", ours(Taylor(1), "residual")))
    return found + diffusers_systems() + cache_dit_systems()


def ours(
    rule: Predictor, tap: str, anchors: Sequence[int] = ANCHORS
) -> Callable[[Any], Callable[[], int]]:
    """Attach a rule of foreseer; its report tells the bytes of its histories."""

    def put(pipe: Any) -> Callable[[], int]:
        attached = attach(pipe, rule, anchors, tap)
        return lambda: attached.report().state_bytes

    return put


def l2p(tap: str) -> Callable[[Any], Callable[[], int]]:
    """Attach L2P with eight weights at every timed step, none of them zero."""
    predictor = L2P(L2P_STEPS, L2P_ANCHORS)
    predictor.weight[:, L2P_ANCHORS[-1] + 1 :, L2P_ANCHORS] = torch.linspace(
        0.02, 0.23, len(L2P_ANCHORS), dtype=torch.float64
    )

    def put(pipe: Any) -> Callable[[], int]:
        grid = FlowMatchEulerDiscreteScheduler()
        grid.set_timesteps(sigmas=np.linspace(1.0, 1 / L2P_STEPS, L2P_STEPS))
        predictor.spec = PredictorSpec(
            tap=tap,
            anchors=L2P_ANCHORS,
            sigmas=tuple(flow_sigmas(grid)),
            host=host_fingerprint(pipe.transformer),
            scheduler=type(grid).__name__,
            num_branches=1,
            guidance_scale=GUIDANCE,
            dtype="float32",
        )
        return ours(predictor, tap, L2P_ANCHORS)(pipe)

    return put


def diffusers_systems() -> list[System]:
    """The caches of diffusers by `enable_cache`; the pipeline names their cache context."""

    def enabled(config: object) -> Callable[[Any], Callable[[], int]]:
        def put(pipe: Any) -> Callable[[], int]:
            pipe.transformer.enable_cache(config)
            return lambda: held(list(hook_states(pipe.transformer)))

        return put

    # Ratios of 1 never add to the error, so MagCache computes what it retains and nothing else.
    mag = MagCacheConfig(
        num_inference_steps=NUM_STEPS,
        mag_ratios=[1.0] * NUM_STEPS,
        max_skip_steps=NUM_STEPS,
        retention_ratio=3 / NUM_STEPS,
    )
    lite = TaylorSeerCacheConfig(use_lite_mode=True)
    first = FirstBlockCacheConfig(threshold=1e9)
    attention_only = (NUM_BLOCKS, 0)
    return [
        System(
            "diffusers TaylorSeer",
            "attention",
            enabled(TaylorSeerCacheConfig()),
            skipped=attention_only,
        ),
        System("diffusers TaylorSeer lite", "output", enabled(lite)),
        System(
            "diffusers FirstBlockCache",
            "residual after block 1",
            enabled(first),
            anchors=(0,),
            skipped=(1, 1),
        ),
        System("diffusers MagCache", "residual", enabled(mag), anchors=(0, 1, 2)),
    ]


def cache_dit_systems() -> list[System]:
    """cache-dit's DBCache: a mask for its anchors, and a threshold that skips all other steps."""

    def system(name: str, blocks: int, calibrator: Any, anchors: Sequence[int]) -> System:
        config = DBCacheConfig(
            Fn_compute_blocks=blocks,
            Bn_compute_blocks=0,
            residual_diff_threshold=ALWAYS_SKIP,
            steps_computation_mask=[int(step in anchors) for step in range(NUM_STEPS)],
            num_inference_steps=NUM_STEPS,
        )

        def put(pipe: Any) -> Callable[[], int]:
            cache_dit.enable_cache(pipe, cache_config=config, calibrator_config=calibrator)
            return lambda: held(pipe._context_manager._cached_context_manager)

        tap = f"residual after block {blocks}"
        return System(name, tap, put, anchors=anchors, skipped=(blocks, blocks))

    taylor = TaylorSeerCalibratorConfig(taylorseer_order=1)
    longer = (0, 1, 2, 3, 4)  # it forms no difference before step 3
    return [
        system("cache-dit DBCache F1B0", 1, None, ANCHORS),
        system("cache-dit F1B0 + TaylorSeer O1", 1, taylor, longer),
        system("cache-dit DBCache F8B0", 8, None, ANCHORS),
    ]


def hook_states(transformer: nn.Module) -> Iterator[dict[str, Any]]:
    """What diffusers' hooks keep, by cache context."""
    for module in transformer.modules():
        for hook in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).values():
            yield from (v._state_cache for v in vars(hook).values() if isinstance(v, StateManager))


def held(states: Any) -> int:
    """Bytes of the distinct storages behind all tensors found in state objects.

    Attributes, dicts, lists and tuples are searched; modules are not.
    """
    storages: dict[int, int] = {}
    seen: set[int] = set()
    todo = [states]
    while todo:
        value = todo.pop()
        if id(value) in seen or isinstance(value, nn.Module | type):
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            todo += value.values()
        elif isinstance(value, list | tuple):
            todo += value
        elif hasattr(value, "__dict__"):
            todo += vars(value).values()
    return sum(storages.values())
