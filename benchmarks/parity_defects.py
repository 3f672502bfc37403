"""What stays behind in a cache: a second call, an exception, another size; ours in the same place.

Every row compares their call after the disturbance with ours after the same one. Where the same
call without a disturbance agrees (see the other rows), the difference is what stayed behind.
"""

from collections.abc import Callable, Sequence
from typing import Any

import cache_dit
import diffusers
import torch
from cache_dit import TaylorSeerCalibratorConfig
from diffusers.hooks import FirstBlockCacheConfig
from parity_cache_dit import NAME as CACHE_DIT
from parity_cache_dit import cached as cached_dit
from parity_cache_dit import config as cache_dit_config
from parity_diffusers import ANCHORS, cached, mag_config, taylor_config
from parity_hosts import NUM_STEPS, flux, run
from parity_rows import Row, largest
from parity_steps import calls_per_step, ran
from torch import Tensor

from foreseer.integration.forecasting import forecasting
from foreseer.predictors.rules import Taylor

NAME = f"diffusers {diffusers.__version__}"
WIDER = {"height": 96}


class Stopped(RuntimeError):
    """Raised in the middle of a call."""


def interrupted(pipe: Any) -> None:
    """A call that ends with an exception after step 5."""

    def stop(pipe: Any, index: int, timestep: Tensor, kwargs: dict) -> dict:
        if index == 5:
            raise Stopped
        return kwargs

    try:
        run(pipe, callback_on_step_end=stop)
    except Stopped:
        return


def attempt(pipe: Any, **changes: Any) -> Tensor | str:
    """The call's latents, or the first words of its error."""
    try:
        return run(pipe, **changes)
    except RuntimeError as error:
        return " ".join(str(error).split()[:9])


def configs() -> dict[str, Any]:
    """Each diffusers cache with settings that skip on the tiny FLUX."""
    return {
        "TaylorSeerCache lite": taylor_config(use_lite_mode=True),
        "TaylorSeerCache": taylor_config(),
        "FirstBlockCache": FirstBlockCacheConfig(threshold=0.2),
        "MagCache": mag_config(),
    }


def diffusers_rows() -> list[Row]:
    """Two calls in a row agree; a call after an exception continues the interrupted one."""
    rows = []
    for name, config in configs().items():
        original = f"{NAME} {name}"
        pipe = cached(flux, config)
        clean, again = run(pipe), run(pipe)
        note = "Its second call equals its first: the pipeline's clean-up resets the state."
        rows.append(Row("second call", original, "tiny Flux", largest(clean, again), True, note))
        interrupted(pipe)
        after = run(pipe)
        interrupted(pipe)
        wider = attempt(pipe, **WIDER)
        fresh = run(cached(flux, config), **WIDER)
        if isinstance(wider, str):
            off, size = float("inf"), f"at another size the next call fails: {wider!r}"
        else:
            off = largest(wider, fresh)
            size = f"at another size the next call is {off:.1g} off a fresh pipeline"
        value = largest(clean, after)
        kept = "lives on" if value else "lives on; this first step notices and computes"
        same = value == off == 0
        note = f"The state of the interrupted call {kept}; {size}."
        rows.append(Row("call after an exception", original, "tiny Flux", value, same, note))
    return rows


def our_rows() -> list[Row]:
    """Ours after the same disturbances, against a fresh session."""
    pipe = flux()
    with forecasting(pipe, Taylor(1), ANCHORS, "output"):
        clean, again = run(pipe), run(pipe)
        interrupted(pipe)
        after = run(pipe)
        interrupted(pipe)
        wider = run(pipe, **WIDER)
    fresh = flux()
    with forecasting(fresh, Taylor(1), ANCHORS, "output"):
        expected = run(fresh, **WIDER)
    note = "Bit for bit the same: `set_timesteps` opens every run."
    cases: Sequence[tuple[str, Tensor, Tensor]] = (
        ("second call", clean, again),
        ("call after an exception", clean, after),
        ("another size after an exception", expected, wider),
    )
    original = "foreseer, a fresh session"
    return [Row(n, original, "tiny Flux", largest(a, b), True, note) for n, a, b in cases]


def run_length_row() -> Row:
    """cache-dit's limit on cached steps in a row, with a threshold that always caches."""
    limits = {"residual_diff_threshold": 1.0, "max_continuous_cached_steps": 2}
    pipe = cached_dit(flux, None, steps_computation_mask=None, **limits)
    block = pipe.transformer.single_transformer_blocks[-1]
    steps = ran(calls_per_step(pipe, [block], lambda: run(pipe)))
    same = steps == (0, 1, *range(2, NUM_STEPS, 3))
    note = f"A computed step ends the count. Steps that ran: {' '.join(map(str, steps))}."
    original = f"{CACHE_DIT} DBCache, at most 2 cached in a row"
    return Row("interval(20, 3)", original, "tiny Flux", 0.0 if same else 1.0, same, note)


def pipeline_context_row() -> Row:
    """cache-dit on a pipeline after an exception, at the same and at another size."""
    pipe = cached_dit(flux, TaylorSeerCalibratorConfig())
    clean = run(pipe)
    interrupted(pipe)
    after = run(pipe)
    interrupted(pipe)
    wider = run(pipe, **WIDER)
    fresh = run(cached_dit(flux, TaylorSeerCalibratorConfig()), **WIDER)
    off = max(largest(clean, after), largest(wider, fresh))
    note = "Every pipeline call starts with a new context, also at another size."
    original = f"{CACHE_DIT} DBCache F1B0 on a pipeline"
    return Row("call after an exception", original, "tiny Flux", off, off == 0, note)


def cache_dit_rows() -> list[Row]:
    """What cache-dit keeps, on a pipeline and on a bare transformer, and its run-length limit."""
    original = f"{CACHE_DIT} DBCache F1B0 on a bare transformer"
    dynamic = {"steps_computation_mask": None, "residual_diff_threshold": 0.3}

    def calls(num_steps: int | None, before: Callable[[Any], None]) -> list[Tensor]:
        pipe = flux()
        settings = cache_dit_config(num_inference_steps=num_steps, **dynamic)
        cache_dit.enable_cache(
            pipe.transformer,
            cache_config=settings,
            calibrator_config=TaylorSeerCalibratorConfig(),
        )
        found = []
        for _ in range(3):
            before(pipe.transformer)
            found.append(run(pipe))
        return found

    def refresh(transformer: torch.nn.Module) -> None:
        cache_dit.refresh_context(transformer, num_inference_steps=NUM_STEPS)

    notes = {
        "num_inference_steps unset": "The context lives on: the next call starts as step 20.",
        "num_inference_steps set": "The context is renewed one step late, later each call.",
        "refresh_context before each call": "Its documented remedy works.",
    }
    settings = ((None, lambda _: None), (NUM_STEPS, lambda _: None), (NUM_STEPS, refresh))
    rows = [run_length_row(), pipeline_context_row()]
    for (name, note), (steps, before) in zip(notes.items(), settings, strict=True):
        first, second, third = calls(steps, before)
        off = max(largest(first, second), largest(first, third))
        rows.append(
            Row("second and third call", f"{original}, {name}", "tiny Flux", off, off == 0, note)
        )
    return rows
