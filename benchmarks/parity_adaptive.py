"""Schedules that decide while the run goes on: diffusers' FirstBlockCache and ours."""

from diffusers.hooks import FirstBlockCacheConfig
from parity_diffusers import HOSTS, NAME, blocks_of, cached
from parity_hosts import NUM_STEPS, flux, run
from parity_rows import Row, largest
from parity_steps import calls_per_step, ran

from foreseer.integration.forecasting import forecasting
from foreseer.predictors.rules import Reuse
from foreseer.schedules import FirstBlock

THRESHOLDS = (0.1, 0.2, 0.4)


def adaptive_rows() -> list[Row]:
    """Which steps run, and whether the guidance branches of a step share the decision."""
    rows = []
    for name, make in HOSTS.items():
        for threshold in THRESHOLDS:
            pipe = cached(make, FirstBlockCacheConfig(threshold=threshold))
            theirs = ran(calls_per_step(pipe, [blocks_of(pipe)[1]], lambda p=pipe: run(p)))
            image = run(pipe)
            plain = make()
            schedule = FirstBlock(threshold)
            with forecasting(plain, Reuse(), tap="residual", schedule=schedule) as attached:
                mine = run(plain)
            anchors = tuple(attached.report().anchors)
            original = f"{NAME} FirstBlockCache schedule"
            method = f"FirstBlock({threshold})"
            note = (
                "The same statistic of the first block; what is reused differs, so the runs drift "
                f"apart by {largest(image, mine):.1e}. Theirs {list(theirs)}, ours {list(anchors)}."
            )
            same = anchors == theirs
            rows.append(Row(method, original, name, 0.0 if same else 1.0, same, note))
    return [*rows, *branch_rows()]


def branch_rows() -> list[Row]:
    """With true guidance, FirstBlockCache decides for each branch by itself."""
    pipe = cached(flux, FirstBlockCacheConfig(threshold=0.25))
    block = pipe.transformer.transformer_blocks[1]
    counts = calls_per_step(pipe, [block], lambda: run(pipe, true_cfg_scale=2.0))
    alone = [s for s, count in enumerate(counts) if count == 1]
    plain = flux()
    block = plain.transformer.transformer_blocks[1]
    schedule = FirstBlock(0.25)
    with forecasting(plain, Reuse(), tap="residual", schedule=schedule):
        run(plain, true_cfg_scale=2.0)  # the first call also proves the tap
        mine = calls_per_step(plain, [block], lambda: run(plain, true_cfg_scale=2.0))
    ours = [s for s, count in enumerate(mine) if count == 1]
    note = (
        f"At steps {alone} one guidance branch was computed and the other reused; guidance scales "
        f"their mismatch. Ours takes one decision per step: {len(ours)} such steps of {NUM_STEPS}."
    )
    host = "tiny Flux, true guidance 2"
    original = f"{NAME} FirstBlockCache schedule"
    return [Row("one decision per step", original, host, float(bool(alone)), False, note)]
