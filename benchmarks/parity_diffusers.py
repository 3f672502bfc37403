"""Comparisons with diffusers' hooks on whole pipeline calls."""

from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import torch
from diffusers import WanTransformer3DModel
from diffusers.hooks import (
    FirstBlockCacheConfig,
    MagCacheConfig,
    TaylorSeerCacheConfig,
    apply_first_block_cache,
    apply_mag_cache,
    apply_taylorseer_cache,
)
from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS
from parity_hosts import NUM_STEPS, dit, flux, give_context, has_hooks, run
from parity_rows import Row, largest
from parity_steps import calls_per_step, ran
from parity_taps import module_forecasts, tail_forecasts
from torch import Tensor, nn

from foreseer.integration.forecasting import forecasting
from foreseer.integration.schedule import diffusers_interval, magcache
from foreseer.predictors.base import Predictor
from foreseer.predictors.rules import Reuse, Taylor

NAME = f"diffusers {diffusers.__version__}"
ANCHORS = diffusers_interval(NUM_STEPS)
HOSTS: dict[str, Callable[[], Any]] = {"tiny Flux": flux, "tiny DiT": dit}


def taylor_config(**changes: Any) -> TaylorSeerCacheConfig:
    """TaylorSeerCache with differences in float32 unless changed."""
    return TaylorSeerCacheConfig(**{"taylor_factors_dtype": torch.float32, **changes})


def cached(make: Callable[[], Any], config: object) -> Any:
    """A fresh pipeline with a diffusers cache on its transformer."""
    pipe = make()
    apply = {
        TaylorSeerCacheConfig: apply_taylorseer_cache,
        FirstBlockCacheConfig: apply_first_block_cache,
        MagCacheConfig: apply_mag_cache,
    }[type(config)]
    apply(pipe.transformer, config)
    if make is dit:
        give_context(pipe.transformer)
    return pipe


def ours(
    make: Callable[[], Any], rule: Predictor, anchors: Sequence[int], tap: str, **changes: Any
) -> Tensor:
    """The product: `forecasting` around the same call."""
    pipe = make()
    with forecasting(pipe, rule, anchors, tap):
        return run(pipe, **changes)


def blocks_of(pipe: Any) -> list[nn.Module]:
    """All blocks of the trunk in calling order."""
    lists = ("transformer_blocks", "single_transformer_blocks")
    return [block for name in lists for block in getattr(pipe.transformer, name, ())]


def lite_rows() -> list[Row]:
    """Lite mode forecasts the output of `proj_out`: our `output` tap."""
    rows = []
    original = f"{NAME} TaylorSeerCache lite"
    for order in (1, 2):
        theirs = run(cached(flux, taylor_config(use_lite_mode=True, max_order=order)))
        mine = ours(flux, Taylor(order), ANCHORS, "output")
        note = "Same ladder on the same tensor, `proj_out`'s output; they differ by the rounding."
        rows.append(
            Row(
                f"Taylor({order}), output", original, "tiny Flux", largest(theirs, mine), True, note
            )
        )
    theirs = run(cached(flux, taylor_config(use_lite_mode=True)), true_cfg_scale=2.0)
    mine = ours(flux, Taylor(1), ANCHORS, "output", true_cfg_scale=2.0)
    note = "Two calls per step: one state per cache context there, one history per call here."
    host = "tiny Flux, true guidance 2"
    rows.append(Row("Taylor(1), output", original, host, largest(theirs, mine), True, note))
    theirs = run(cached(flux, TaylorSeerCacheConfig(use_lite_mode=True)))
    mine = ours(flux, Taylor(1), ANCHORS, "output")
    note = "By default they store the differences in bfloat16; ours sums in float32 or wider."
    default = f"{original}, default dtype"
    rows.append(Row("Taylor(1), output", default, "tiny Flux", largest(theirs, mine), False, note))
    theirs, full = run(cached(dit, taylor_config(use_lite_mode=True))), run(dit())
    mine = ours(dit, Taylor(1), ANCHORS, "output")
    note = (
        "Their blocks return zeros at forecast steps and no module of a DiT is called `proj_out`, "
        "so nothing is forecast: the head runs on zeros. Distance to the run without a cache: "
        f"theirs {largest(theirs, full):.2f}, ours {largest(mine, full):.2f}."
    )
    rows.append(Row("Taylor(1), output", original, "tiny DiT", largest(theirs, mine), False, note))
    return rows


def default_rows() -> list[Row]:
    """Default mode forecasts what every attention module returns."""
    rows = []
    original = f"{NAME} TaylorSeerCache"
    for order in (1, 2):
        theirs = run(cached(flux, taylor_config(max_order=order)))
        pipe = flux()
        modules = [m for name, m in pipe.transformer.named_modules() if name.endswith(".attn")]
        with module_forecasts(modules, Taylor(order), ANCHORS, NUM_STEPS):
            mine = run(pipe)
        note = "Our rule in the place of their hook, at every attention module and stream."
        method = f"Taylor({order}), attention modules (harness)"
        rows.append(Row(method, original, "tiny Flux", largest(theirs, mine), True, note))
    pipe = cached(flux, taylor_config())
    theirs, mine = run(pipe), ours(flux, Taylor(1), ANCHORS, "output")
    block = pipe.transformer.single_transformer_blocks[1]
    mlps = calls_per_step(pipe, [block.proj_mlp], lambda: run(pipe))
    note = (
        "They forecast attention outputs only: the rest of every block runs at every step "
        f"(an MLP ran at {len(ran(mlps))} of {NUM_STEPS} steps, anchors are {len(ANCHORS)})."
    )
    rows.append(Row("Taylor(1), output", original, "tiny Flux", largest(theirs, mine), False, note))
    pipe = cached(dit, taylor_config())
    theirs, mine, full = run(pipe), ours(dit, Taylor(1), ANCHORS, "output"), run(dit())
    hooked = [m for m in pipe.transformer.modules() if has_hooks(m)]
    note = (
        "Their pattern wants names that end in `attn`; a DiT's are called `attn1`, so "
        f"{len(hooked)} modules are hooked and every step is computed without a word (distance to "
        f"the run without a cache: {largest(theirs, full):.1f}). On WanTransformer3DModel, which "
        f"offers enable_cache, {hooked_on_wan()} are hooked."
    )
    rows.append(Row("Taylor(1), output", original, "tiny DiT", largest(theirs, mine), False, note))
    return rows


def hooked_on_wan() -> int:
    """How many modules the default patterns find on a video transformer with `enable_cache`."""
    transformer = WanTransformer3DModel(
        num_attention_heads=1,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=8,
        ffn_dim=8,
        num_layers=1,
    )
    transformer.enable_cache(taylor_config())
    return sum(has_hooks(module) for module in transformer.modules())


def schedule_rows() -> list[Row]:
    """The steps that really run, counted by block calls."""
    rows = []
    for name, make in HOSTS.items():
        if make is flux:
            for steps, after in ((50, None), (NUM_STEPS, 16)):
                config = taylor_config(use_lite_mode=True, disable_cache_after_step=after)
                pipe = cached(make, config)
                block = blocks_of(pipe)[1]
                theirs = ran(calls_per_step(pipe, [block], lambda p=pipe, n=steps: run(p, n)))
                note = f"Steps that ran at T = {steps}: {' '.join(map(str, theirs))}."
                method = f"diffusers_interval({steps}, last_forecast={after})"
                same = theirs == diffusers_interval(steps, last_forecast=after)
                original = f"{NAME} TaylorSeerCache schedule"
                rows.append(Row(method, original, name, 0.0 if same else 1.0, same, note))
        pipe = cached(make, mag_config())
        theirs = ran(calls_per_step(pipe, [blocks_of(pipe)[1]], lambda p=pipe: run(p)))
        same = theirs == magcache(mag_config().mag_ratios.tolist(), 0.3)
        note = f"Decided by the ratios alone. Steps that ran: {' '.join(map(str, theirs))}."
        original = f"{NAME} MagCache schedule"
        rows.append(Row("magcache", original, name, 0.0 if same else 1.0, same, note))
    return rows


def mag_config() -> MagCacheConfig:
    """MagCache with the published FLUX ratios and a threshold that skips on the tiny hosts."""
    return MagCacheConfig(mag_ratios=FLUX_MAG_RATIOS, num_inference_steps=NUM_STEPS, threshold=0.3)


def residual_rows() -> list[Row]:
    """MagCache and FirstBlockCache reuse a residual: the schedules are theirs, the tap is ours."""
    rows = []
    for name, make in HOSTS.items():
        theirs = run(cached(make, mag_config()))
        anchors = magcache(mag_config().mag_ratios.tolist(), 0.3)
        mine = ours(make, Reuse(), anchors, "residual")
        note = "Both add the trunk's last residual to the current input, on the same anchors."
        original = f"{NAME} MagCache"
        rows.append(Row("Reuse, residual", original, name, largest(theirs, mine), True, note))
        pipe = cached(make, FirstBlockCacheConfig(threshold=0.2))
        theirs = run(pipe)
        anchors = ran(calls_per_step(pipe, [blocks_of(pipe)[1]], lambda p=pipe: run(p)))
        plain = make()
        with tail_forecasts(blocks_of(plain), Reuse(), anchors, NUM_STEPS):
            mine = run(plain)
        note = f"The same reuse behind a first block that always runs; anchors {list(anchors)}."
        original = f"{NAME} FirstBlockCache"
        method = "Reuse, behind the first block (harness)"
        rows.append(Row(method, original, name, largest(theirs, mine), True, note))
        mine = ours(make, Reuse(), anchors, "residual")
        note = "Our tap reuses the residual of the whole trunk; theirs recomputes the first block."
        rows.append(Row("Reuse, residual", original, name, largest(theirs, mine), False, note))
    return rows
