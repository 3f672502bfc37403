"""Which steps are anchors: lists, and the rules that make them.

A one is an anchor, a zero a forecast; the list has one entry per step.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, zip_longest
from typing import Any

PUBLISHED_L2P = {
    11: (0, 1, 2, 4, 6, 9, 14, 23, 30, 37, 44),
    10: (0, 1, 2, 4, 7, 14, 23, 31, 38, 45),
    9: (0, 1, 2, 4, 9, 17, 26, 35, 43),
    8: (0, 1, 2, 4, 10, 20, 31, 41),
    7: (0, 1, 2, 4, 12, 24, 38),
    6: (0, 1, 2, 4, 16, 32),
}
"""The hand-tuned lists of L2P's release for 50 steps, by number of anchors (arXiv 2604.26365)."""


def uniform(
    num_anchors: int, num_steps: int = 50, expert_steps: Sequence[int] = (0,)
) -> tuple[int, ...]:
    """Anchors `round(num_steps * i / num_anchors)`; of several transformers as `warped` has it."""
    return warped(num_anchors, num_steps, 1.0, expert_steps)


def warped(
    num_anchors: int, num_steps: int = 50, gamma: float = 1.2, expert_steps: Sequence[int] = (0,)
) -> tuple[int, ...]:
    """Anchors `round(num_steps * (i / num_anchors) ** gamma)`, denser at the start for gamma > 1.

    Where several transformers take turns each has such a list over its own steps, with anchors in
    proportion to them and one at least.

    Args:
        num_anchors: network evaluations.
        num_steps: steps of the run.
        gamma: 1 spreads the anchors evenly.
        expert_steps: first step of each transformer, starting with 0.

    Raises:
        ValueError: two anchors fall on one step, or a transformer gets none.
    """
    lengths = [b - a for a, b in zip(expert_steps, [*expert_steps[1:], num_steps], strict=True)]
    shares = _shares(num_anchors, lengths)
    return check_anchors(
        [
            first + round(length * (i / share) ** gamma)
            for first, length, share in zip(expert_steps, lengths, shares, strict=True)
            for i in range(share)
        ],
        num_steps,
    )


def published(
    num_anchors: int, num_steps: int = 50, expert_steps: Sequence[int] = (0,)
) -> tuple[int, ...]:
    """The list of `PUBLISHED_L2P`.

    Raises:
        ValueError: there is none of so many anchors and steps, or for several transformers.
    """
    if num_steps != 50 or len(expert_steps) > 1 or num_anchors not in PUBLISHED_L2P:
        raise ValueError(
            f"found {num_anchors} anchors, {num_steps} steps and {len(expert_steps)} "
            f"transformer(s); the published lists are of {sorted(PUBLISHED_L2P)} anchors for 50 "
            "steps of one."
        )
    return PUBLISHED_L2P[num_anchors]


COMMON: dict[str, Callable[..., tuple[int, ...]]] = {
    "uniform": uniform,
    "published": published,
    "warped": warped,
}
"""Lists that every method is measured on and that searches start from, by their name in tables."""


def common_lists(
    num_anchors: int, num_steps: int = 50, expert_steps: Sequence[int] = (0,)
) -> dict[str, tuple[int, ...]]:
    """Those of `COMMON` that there are of so many anchors."""
    found = {}
    for name, make in COMMON.items():
        try:
            found[name] = make(num_anchors, num_steps, expert_steps=expert_steps)
        except ValueError:  # it has none of so many anchors
            continue
    return found


def _shares(num_anchors: int, lengths: Sequence[int]) -> list[int]:
    """Anchors of each transformer: one, and the others as seats in proportion (D'Hondt)."""
    if num_anchors < len(lengths):
        raise ValueError(
            f"found {num_anchors} anchor(s) for {len(lengths)} transformer(s), expected one for "
            "each at least: what one computed says nothing about the next."
        )
    shares = [1] * len(lengths)
    for _ in range(num_anchors - sum(shares)):
        next_one = min(range(len(lengths)), key=lambda k: (shares[k] + 1) / lengths[k])
        shares[next_one] += 1
    return shares


def interval(num_steps: int, interval: int, warmup: int = 3) -> tuple[int, ...]:
    """TaylorSeer's schedule: steps `0 .. warmup - 1`, then every `interval` steps after the last.

    Raises:
        ValueError: an argument is below 1.
    """
    if interval < 1 or warmup < 1:
        raise ValueError(f"interval is {interval} and warmup {warmup}, expected both >= 1.")
    later = range(warmup - 1 + interval, num_steps, interval)
    return (*range(min(warmup, num_steps)), *later)


def diffusers_interval(
    num_steps: int, interval: int = 5, warmup: int = 3, last_forecast: int | None = None
) -> tuple[int, ...]:
    """The schedule of diffusers' `TaylorSeerCacheConfig`, which is not `interval`'s.

    A step s is an anchor when s < warmup, when (s - warmup - 1) mod interval = 0, or when
    s >= last_forecast: 0 1 2 4 9 14 ... by default.

    Args:
        num_steps: steps of the run.
        interval: its `cache_interval`.
        warmup: its `disable_cache_before_step`.
        last_forecast: its `disable_cache_after_step`; None forecasts to the end.

    Raises:
        ValueError: interval or warmup is below 1.
    """
    if interval < 1 or warmup < 1:
        raise ValueError(f"interval is {interval} and warmup {warmup}, expected both >= 1.")
    end = num_steps if last_forecast is None else last_forecast
    return tuple(
        step
        for step in range(num_steps)
        if step < warmup or (step - warmup - 1) % interval == 0 or step >= end
    )


def spectrum(
    num_steps: int, window: float = 2.0, growth: float = 0.75, warmup: int = 5
) -> tuple[int, ...]:
    """Spectrum's schedule: `0 .. warmup - 1`, then gaps that grow (arXiv 2603.01623, its code).

    Gap k is floor(window + k growth), k = 0, 1, ... At 50 steps growth 0.75 makes 14 anchors and 3
    makes 10, the two settings published for FLUX.

    Args:
        num_steps: steps of the run.
        window: its first window, >= 1.
        growth: its `flex_window`, >= 0.
        warmup: its `warmup_steps`, >= 1.

    Raises:
        ValueError: an argument is out of range.
    """
    if not (1 <= window < math.inf and 0 <= growth < math.inf) or warmup < 1:
        raise ValueError(
            f"found window {window}, growth {growth} and warmup {warmup}; expected window >= 1, "
            "growth >= 0 and warmup >= 1."
        )
    anchors, gaps = list(range(min(warmup, num_steps))), 0
    while (step := anchors[-1] + math.floor(round(window + gaps * growth, 3))) < num_steps:
        anchors.append(step)
        gaps += 1
    return tuple(anchors)


def magcache(
    ratios: Sequence[float], threshold: float = 0.06, max_run: int = 3, retention: float = 0.2
) -> tuple[int, ...]:
    """MagCache's schedule, which its calibrated ratios fix in advance (arXiv 2506.09045).

    With P the product of the ratios since the last anchor, a step adds |1 - P| to the error and is
    forecast while error <= threshold, the run is no longer than `max_run`, and the step is past the
    first `retention` of the run; an anchor sets both back.

    Args:
        ratios: mean ||residual_t|| / ||residual_{t-1}|| of every step, the first one unused;
            `trajectories.gram.magnitude_ratios` reads them off a recording.
        threshold: largest error, >= 0.
        max_run: most forecasts in a row.
        retention: fraction of the run kept whole at its start, in (0, 1].

    Raises:
        ValueError: an argument is out of range, or a ratio is not positive.
    """
    if threshold < 0 or max_run < 1 or not 0 < retention <= 1 or min(ratios, default=0) <= 0:
        raise ValueError(
            f"found threshold {threshold}, max_run {max_run}, retention {retention} and ratios "
            f"from {min(ratios, default=0)}; expected threshold >= 0, max_run >= 1, retention in "
            "(0, 1] and positive ratios."
        )
    first = max(1, int(retention * len(ratios) + 0.5))
    anchors, product, error, run = list(range(first)), 1.0, 0.0, 0
    for step in range(first, len(ratios)):
        product *= ratios[step]
        error += abs(1 - product)
        run += 1
        if error > threshold or run > max_run:
            anchors.append(step)
            product, error, run = 1.0, 0.0, 0
    return tuple(anchors)


def check_anchors(anchors: Sequence[int], num_steps: int, begun: bool = False) -> tuple[int, ...]:
    """The anchors as a tuple, if they are a schedule for a run of `num_steps` steps.

    Args:
        anchors: steps at which the network runs.
        num_steps: steps of the run.
        begun: whether the run begins with features of a run before.

    Raises:
        ValueError: step 0 is missing, or a step is out of order, doubled or out of range.
    """
    anchors = tuple(anchors)
    if begun and (not anchors or anchors[0] < 0):
        raise ValueError(
            f"the anchors are {list(anchors)}, expected one step at least: the features of the "
            "stage before are of a coarser grid, and nothing on this one would be computed."
        )
    if not begun and (not anchors or anchors[0] != 0):
        raise ValueError(
            f"the anchors are {list(anchors)}, expected a list that starts with step 0: "
            "there is nothing to forecast from before the first anchor."
        )
    if any(later <= earlier for earlier, later in zip(anchors, anchors[1:], strict=False)):
        raise ValueError(
            f"the anchors are {list(anchors)}, expected steps in rising order, no doubles."
        )
    if anchors[-1] >= num_steps:
        raise ValueError(
            f"the last anchor is step {anchors[-1]}, but the run has {num_steps} steps (0 to "
            f"{num_steps - 1}); give anchors for {num_steps} steps."
        )
    return anchors


SCM_RUNS = {
    "slow": ((8, 3, 3, 2, 1, 1), (1, 2, 2, 2, 3)),
    "medium": ((6, 2, 2, 2, 2, 1), (1, 3, 3, 3, 3)),
    "fast": ((6, 1, 1, 1, 1, 1), (1, 3, 4, 5, 4)),
    "ultra": ((4, 1, 1, 1, 1), (2, 5, 6, 7)),
}
"""Lengths of the runs of anchors and of forecasts in cache-dit's masks for 28 steps."""


def mask_anchors(mask: Sequence[int] | str) -> tuple[int, ...]:
    """The anchors of a mask.

    Args:
        mask: ones and zeros, as a list or as text; blanks and commas in the text do not count.

    Raises:
        ValueError: another entry, or no anchor at step 0.
    """
    given = "".join(mask.replace(",", " ").split()) if isinstance(mask, str) else mask
    entries = [str(entry) for entry in given]
    if unknown := sorted(set(entries) - {"0", "1"}):
        raise ValueError(f"the mask holds {', '.join(unknown)}; expected ones and zeros only.")
    anchors = [step for step, entry in enumerate(entries) if entry == "1"]
    return check_anchors(anchors, len(entries))


def anchors_mask(anchors: Sequence[int], num_steps: int) -> list[int]:
    """The mask of a list of anchors, as other libraries read it.

    Args:
        anchors: steps at which the network runs.
        num_steps: steps of the run.

    Raises:
        ValueError: the anchors are not a schedule of the run.
    """
    known = set(check_anchors(anchors, num_steps))
    return [int(step in known) for step in range(num_steps)]


def scm(policy: str, num_steps: int = 28) -> tuple[int, ...]:
    """Anchors of cache-dit's step masks, drawn to another number of steps in proportion.

    At 28 steps they are cache-dit's own. Elsewhere the ends of the runs are scaled and rounded,
    which is not the rule cache-dit grows its runs by: import its mask with `mask_anchors` where the
    very same steps matter.

    Args:
        policy: `slow`, `medium`, `fast` or `ultra`.
        num_steps: steps of the run, at least 16 (cache-dit has other tables for fewer).

    Raises:
        ValueError: the policy is unknown, or there are fewer than 16 steps.
    """
    if policy not in SCM_RUNS or num_steps < 16:
        raise ValueError(
            f"policy is {policy!r} with {num_steps} steps, expected one of {', '.join(SCM_RUNS)} "
            "and at least 16 steps."
        )
    computed, cached = SCM_RUNS[policy]
    runs = [run for pair in zip_longest(computed, cached, fillvalue=0) for run in pair]
    total = sum(runs)
    ends = [round(num_steps * end / total) for end in accumulate(runs)]
    starts = [0, *ends]
    spans = list(zip(starts, ends, strict=False))[::2]
    return tuple(step for start, end in spans for step in range(start, end))


@dataclass(frozen=True)
class Shallow:
    """Anchors at which the outer blocks alone run; what lies between them is forecast.

    A list of anchors with it has three kinds of step: full, shallow, and forecast, the steps that
    are no anchors. Forecasts of the output look back on full and shallow steps alike.

    Args:
        steps: of the anchors; the first anchor is a full one.
        predictor: forecasts what lies between, from the full steps: `Reuse()` is DeepCache's
            scheme. A learned one brings its tap and must have been fitted for these full steps.
        tap: `deep.<d>`: the first d and the last d blocks run, of a U-Net the first d down blocks
            and the last d up blocks.
    """

    steps: Sequence[int]
    predictor: Any
    tap: str = "deep.1"

    def full_steps(self, anchors: Sequence[int]) -> tuple[int, ...]:
        """The anchors at which the whole network runs.

        Args:
            anchors: full and shallow steps.

        Raises:
            ValueError: a shallow step is none of the anchors, is named twice, or is the first.
        """
        steps, listed = list(self.steps), list(anchors)
        wrong = [step for step in steps if step not in listed or steps.count(step) > 1]
        if wrong or not steps:
            raise ValueError(
                f"the shallow steps are {steps or 'none'}, expected some of the anchors {listed}, "
                f"each once{f'; found {wrong}' if wrong else ''}."
            )
        if listed[0] in steps:
            raise ValueError(
                f"step {listed[0]} is the first anchor and a shallow step; the first step runs in "
                "full, since nothing is known before it that the deep trunk could be forecast from."
            )
        return tuple(step for step in listed if step not in steps)


def three_kinds(
    depths: Sequence[int], num_steps: int = 50
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Anchors and shallow steps of a list with one depth for every step.

    Args:
        depths: 0 for a forecast, 1 for a shallow step, more for a full one (DaTo, arXiv 2501.00375,
            has 0, 1 and 12).
        num_steps: steps of the run.

    Returns:
        Full and shallow steps, `anchors=`, and the shallow ones among them, `Shallow(steps)`.

    Raises:
        ValueError: there is not one depth for every step, or the first step is not full.
    """
    if len(depths) != num_steps:
        raise ValueError(
            f"found depths of {len(depths)} steps, expected one for each of the {num_steps}."
        )
    wrong = [depth for depth in depths if type(depth) is not int or depth < 0]
    if wrong or depths[0] < 2:
        raise ValueError(
            f"the depths begin with {depths[0]}{f' and hold {wrong}' if wrong else ''}; expected "
            "0 for a forecast, 1 for a shallow step and more for a full one, which the first is."
        )
    evaluated = tuple(step for step, depth in enumerate(depths) if depth)
    return evaluated, tuple(step for step in evaluated if depths[step] == 1)
