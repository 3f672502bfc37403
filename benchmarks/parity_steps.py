"""Which steps of a pipeline call really run."""

from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor, nn


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
