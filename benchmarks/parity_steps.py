"""Which steps of a pipeline call really run, and the schedules of diffusers' hooks as lists."""

from collections.abc import Callable, Collection, Iterable
from typing import Any

from torch import Tensor, nn


def diffusers_interval(
    num_steps: int, interval: int = 5, warmup: int = 3, disable_after: int | None = None
) -> tuple[int, ...]:
    """The anchors of diffusers' TaylorSeerCache.

    Step s runs when s < warmup, (s - warmup - 1) mod interval = 0 or s >= disable_after.
    """
    last = num_steps if disable_after is None else disable_after
    regular = (s for s in range(num_steps) if s < warmup or (s - warmup - 1) % interval == 0)
    return tuple(sorted({*regular, *range(last, num_steps)}))


def magcache_steps(
    ratios: Iterable[float], threshold: float, max_skip: int = 3, retention: float = 0.2
) -> tuple[int, ...]:
    """The anchors of diffusers' MagCache, which depend on the calibrated ratios alone.

    Args:
        ratios: mean norm of a step's residual over that of the step before, one per step.
        threshold: largest sum of abs(1 - running product of ratios) over skipped steps.
        max_skip: largest number of skipped steps in a row.
        retention: share of the run that is always computed.
    """
    ratios = list(ratios)
    anchors, product, error, skipped = [], 1.0, 0.0, 0
    for s, ratio in enumerate(ratios):
        if s >= int(retention * len(ratios) + 0.5):
            product *= ratio
            skipped += 1
            error += abs(1 - product)
            if anchors and error <= threshold and skipped <= max_skip:
                continue
            product, error, skipped = 1.0, 0.0, 0
        anchors.append(s)
    return tuple(anchors)


def calls_per_step(
    pipe: Any, modules: Collection[nn.Module], start: Callable[[], Tensor]
) -> list[int]:
    """How often the modules' own forwards ran in each step of a call.

    Args:
        pipe: its scheduler's `step` separates the steps.
        modules: counted below any diffusers hook, so only real evaluations count.
        start: makes the call.
    """
    counts, total, undo = [], 0, []

    def watch(module: nn.Module) -> None:
        hooks = getattr(module, "_diffusers_hook", None)
        place, name = (hooks._fn_refs[0], "original_forward") if hooks else (module, "forward")
        own = getattr(place, name)

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal total
            total += 1
            return own(*args, **kwargs)

        setattr(place, name, forward)
        undo.append(lambda: setattr(place, name, own))

    for module in modules:
        watch(module)
    step = pipe.scheduler.step

    def closing(*args: Any, **kwargs: Any) -> Any:
        nonlocal total
        counts.append(total)
        total = 0
        return step(*args, **kwargs)

    pipe.scheduler.step = closing
    try:
        start()
    finally:
        pipe.scheduler.step = step
        for restore in undo:
            restore()
    return counts


def ran(counts: list[int]) -> tuple[int, ...]:
    """The steps with at least one call."""
    return tuple(s for s, count in enumerate(counts) if count)
