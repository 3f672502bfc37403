"""Step masks: the list of ones and zeros other caching libraries write a schedule as.

A one is an anchor, a zero a forecast; the list has one entry per step.
"""

from collections.abc import Sequence
from itertools import accumulate, zip_longest

from foreseer.integration.schedule import check_anchors

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
