"""Comparisons with cache-dit: its calibrators' states, and DBCache F1B0 on whole pipeline calls."""

from collections.abc import Callable
from typing import Any

import cache_dit
from cache_dit import (
    BlockAdapter,
    DBCacheConfig,
    DMDCalibratorConfig,
    FoCaCalibratorConfig,
    ForwardPattern,
    TaylorSeerCalibratorConfig,
)
from cache_dit.caching.cache_contexts.calibrators.dmd import DMDCalibrator, DMDState
from cache_dit.caching.cache_contexts.calibrators.foca import FoCaState
from cache_dit.caching.cache_contexts.calibrators.taylorseer import (
    TaylorSeerCalibrator,
    TaylorSeerState,
)
from cache_dit.caching.patch_functors import DiTPatchFunctor
from parity_diffusers import blocks_of, ours
from parity_hosts import NUM_STEPS, dit, flux, run
from parity_rows import Row, largest
from parity_rules import DMD, CacheDitFoCa, TwoBack
from parity_states import cache_dit_state, differing, distance, state_forecasts, trajectory
from parity_taps import tail_forecasts

from foreseer.predictors.base import Predictor
from foreseer.predictors.rules import Foca2Point, FocaRecursive, Reuse, Taylor

NAME = f"cache-dit {cache_dit.__version__}"
STATE_ANCHORS = (0, 1, 2, *range(6, 50, 4))
ANCHORS = (0, 1, 2, 3, 4, 8, 12, 16)
MASK = [int(s in ANCHORS) for s in range(NUM_STEPS)]
HOST = "random smooth trajectory, float64"


def pair(method: str, rule: Predictor, original: str, state: Any, same: bool, note: str) -> Row:
    """A row of one state object against one rule; a note's {steps} lists where they differ."""
    features = trajectory()
    theirs = cache_dit_state(state)(features, STATE_ANCHORS)
    mine = state_forecasts(rule, features, STATE_ANCHORS)
    note = note.format(steps=" ".join(map(str, differing(theirs, mine, 1e-6))))
    return Row(method, f"{NAME} {original}", HOST, distance(theirs, mine), same, note)


def taylor_rows() -> list[Row]:
    """TaylorSeerState and its calibrator: the ladder is ours, the start of the clock is not."""
    guard = "Its guard `current_step > 1` forms no difference at steps 0 and 1: warmup 3."
    rows = [
        pair(
            f"Taylor({order}, warmup=3)",
            Taylor(order, warmup=3),
            "TaylorSeerState",
            TaylorSeerState(n_derivatives=order),
            True,
            guard,
        )
        for order in (1, 2, 3)
    ]
    note = "Without the guard order 2 is there one anchor earlier; they differ at steps {steps}."
    state = TaylorSeerState(n_derivatives=2)
    rows.append(pair("Taylor(2)", Taylor(2), "TaylorSeerState", state, False, note))
    calibrator = TaylorSeerCalibrator(n_derivatives=1)
    note = (
        "States are made in the first update, after the clock's first tick, so the guard bites one "
        "step later than in the state object: warmup 4."
    )
    first = "TaylorSeerCalibrator, first use"
    rows.append(pair("Taylor(1, warmup=4)", Taylor(1, warmup=4), first, calibrator, True, note))
    calibrator.reset_cache()
    note = (
        "After reset_cache the same object forecasts otherwise at steps {steps}: the clock of its "
        "first use is one off."
    )
    again = "TaylorSeerCalibrator, second use"
    rows.append(pair("Taylor(1, warmup=4)", Taylor(1, warmup=4), again, calibrator, False, note))
    return rows


def foca_rows() -> list[Row]:
    """The FoCa calibrator is a third reading of the paper, beside our two reconstructions."""
    ramp = [trajectory()[0] * 0 + s for s in range(NUM_STEPS)]
    missed = cache_dit_state(FoCaState())(ramp, ANCHORS)
    worst = max(largest(forecast, ramp[s]) for s, forecast in missed.items())
    note = (
        "F_full + h/2 ((F_full - F_full_prev) + (F_k - F_km1)), h at most 3; the anchors' "
        f"difference is not divided by their gap, so a ramp of slope 1 is missed by {worst:.0f} at "
        "gap 4."
    )
    rows = [pair("CacheDitFoCa (harness)", CacheDitFoCa(), "FoCaState", FoCaState(), True, note)]
    note = "Ours divides by the gap and sees anchors only; theirs reads its own forecasts too."
    rows.append(pair("Foca2Point", Foca2Point(), "FoCaState", FoCaState(), False, note))
    note = "Both step through their forecasts; ours divides the anchors' difference by its gap."
    rows.append(pair("FocaRecursive", FocaRecursive(), "FoCaState", FoCaState(), False, note))
    return rows


def dmd_rows() -> list[Row]:
    """DMD agrees; its Taylor fallback is not the Taylor it says it is."""
    note = "The same decomposition through a QR; the fallback's slope is (F_0 - F_2) / g_1."
    rows = [pair("DMD(TwoBack()) (harness)", DMD(TwoBack()), "DMDState", DMDState(), True, note)]
    note = (
        "Its fallback is meant to be its Taylor but differences against the anchor before the last "
        "one, twice the slope on even gaps; they differ at the fallback steps {steps}."
    )
    rule = DMD(Taylor(1, warmup=3))
    rows.append(pair("DMD(Taylor(1)) (harness)", rule, "DMDState", DMDState(), False, note))
    features, calibrator = trajectory(), DMDCalibrator()
    first = cache_dit_state(calibrator)(features, STATE_ANCHORS)
    calibrator.reset_cache()
    second = cache_dit_state(calibrator)(features, STATE_ANCHORS)
    steps = " ".join(map(str, differing(first, second, 1e-6)))
    note = f"First use against second use after reset_cache: the clock is one off, steps {steps}."
    original = f"{NAME} DMDCalibrator, first and second use"
    rows.append(Row("-", original, HOST, distance(first, second), False, note))
    return rows


def config(**changes: Any) -> DBCacheConfig:
    """DBCache F1B0 that computes exactly at `ANCHORS`, unless changed."""
    values: dict[str, Any] = {
        "Fn_compute_blocks": 1,
        "Bn_compute_blocks": 0,
        "max_warmup_steps": 3,
        "steps_computation_mask": MASK,
        "steps_computation_policy": "static",
        "num_inference_steps": NUM_STEPS,
        "enable_separate_cfg": False,
    }
    return DBCacheConfig(**(values | changes))


def cached(make: Callable[[], Any], calibrator: Any, **changes: Any) -> Any:
    """A fresh pipeline under cache-dit, of a class of its own because cache-dit patches classes."""
    pipe = make()
    pipe.__class__ = type(type(pipe).__name__, (type(pipe),), {})
    target = pipe
    if make is dit:
        target = BlockAdapter(
            pipe=pipe,
            transformer=pipe.transformer,
            blocks=pipe.transformer.transformer_blocks,
            forward_pattern=ForwardPattern.Pattern_3,
            patch_functor=DiTPatchFunctor(),
            check_forward_pattern=False,
        )
    cache_dit.enable_cache(target, cache_config=config(**changes), calibrator_config=calibrator)
    return pipe


def pipeline_rows() -> list[Row]:
    """DBCache F1B0 with each calibrator against our rules behind the first block."""
    cases: list[tuple[str, Predictor, str, Any]] = [
        ("Reuse", Reuse(), "no calibrator", None),
        ("Taylor(1, warmup=4)", Taylor(1, warmup=4), "TaylorSeer O1", TaylorSeerCalibratorConfig()),
        (
            "Taylor(2, warmup=4)",
            Taylor(2, warmup=4),
            "TaylorSeer O2",
            TaylorSeerCalibratorConfig(taylorseer_order=2),
        ),
        ("CacheDitFoCa", CacheDitFoCa(), "FoCa", FoCaCalibratorConfig()),
        ("DMD(TwoBack())", DMD(TwoBack()), "DMD", DMDCalibratorConfig()),
    ]
    rows = []
    for host, make in (("tiny Flux", flux), ("tiny DiT", dit)):
        for method, rule, name, calibrator in cases:
            theirs = run(cached(make, calibrator))
            pipe = make()
            with tail_forecasts(blocks_of(pipe), rule, ANCHORS, NUM_STEPS):
                mine = run(pipe)
            note = "Our rule in the place of its calibrator, behind the first block, every stream."
            original = f"{NAME} DBCache F1B0, {name}"
            method = f"{method}, behind the first block (harness)"
            rows.append(Row(method, original, host, largest(theirs, mine), True, note))
        theirs = run(cached(make, TaylorSeerCalibratorConfig()))
        mine = ours(make, Taylor(1), ANCHORS, "residual")
        note = (
            "Our tap forecasts the residual of the whole trunk; theirs recomputes the first block."
        )
        original = f"{NAME} DBCache F1B0, TaylorSeer O1"
        rows.append(Row("Taylor(1), residual", original, host, largest(theirs, mine), False, note))
    return rows
