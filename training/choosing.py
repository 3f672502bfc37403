"""What a fit is given when it is not told: its method, and the tap and anchors from Grams."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import try_to_load_from_cache

from foreseer.evaluation.offline import MAX_TRAJECTORIES, TapGrams, best_row, compared
from foreseer.integration.pipelines.load import HUB_NAME, INDEX_FILE
from foreseer.integration.schedule import check_anchors
from foreseer.trajectories.kept_inputs import can_repeat
from foreseer.trajectories.recording import Recording


class Choice(NamedTuple):
    """A tap and a list of anchors; `str(choice)` says where they are from."""

    tap: str
    anchors: list[int]
    num_steps: int
    told: str

    def __str__(self) -> str:
        """One line for a person."""
        listed = " ".join(map(str, self.anchors))
        return (
            f"{len(self.anchors)} of {self.num_steps} steps evaluated, tap {self.tap}, anchors "
            f"{listed} ({self.told})"
        )


def choose(
    recording: Recording,
    evaluations: int | None,
    anchors: Sequence[int] | None,
    taps: Sequence[str],
    items: Sequence[int],
) -> Choice:
    """The anchors given, or those that suit the learned rows best by the Grams of some items.

    The search is that of `foreseer inspect`: a beam search for every formula, the warped lists and
    the published one, all tried with least-squares rows (of a single trajectory, with formulas).

    Args:
        recording: where the Grams are.
        evaluations: network evaluations per trajectory; None where the anchors are given.
        anchors: steps at which the network runs; None searches.
        taps: the first one that is recorded is taken with anchors that are given; else the best.
        items: trajectories to search on.

    Raises:
        ValueError: neither evaluations nor anchors are given, or they contradict each other or the
            recording.
    """
    header = recording.header
    num_steps, least = header.num_steps, len(header.expert_steps)
    recorded = [tap for tap in taps if tap in header.taps]
    if not recorded:
        raise ValueError(
            f"{recording.folder} has the taps {', '.join(header.taps)}, the fit needs "
            f"{' or '.join(taps)}; record it: --taps '[{taps[0]}]'."
        )
    if anchors is not None:
        if evaluations not in (None, len(anchors)):
            raise ValueError(
                f"evaluations is {evaluations}, and {len(anchors)} anchors are given; leave one "
                "of the two out."
            )
        return Choice(recorded[0], list(check_anchors(anchors, num_steps)), num_steps, "as given")
    if evaluations is None:
        raise ValueError(
            f"give the number of network evaluations in place of {num_steps}, as in evaluations=8, "
            "or the steps themselves: anchors=[0, ...]."
        )
    if not least <= evaluations < num_steps:
        raise ValueError(
            f"evaluations is {evaluations}, expected {least} to {num_steps - 1}: the runs of "
            f"{recording.folder} have {num_steps} steps."
        )
    some = list(items)[:: -(-len(items) // MAX_TRAJECTORIES)]
    grams = [
        TapGrams(tap, recording.stack(f"gram/{tap}", some), header.sigmas, header.expert_steps)
        for tap in recorded
    ]
    best = best_row(compared(grams, [evaluations]), learned=grams[0].can_learn)
    told = f"searched on the Grams of {len(some)} trajectories"
    return Choice(best.tap, list(best.anchors), num_steps, told)


def choose_method(recording: Recording, has_pipeline: bool) -> tuple[str, str]:
    """The method of a fit that names none, and why.

    Args:
        recording: what it is fitted on.
        has_pipeline: whether a pipeline is given.
    """
    if has_pipeline:
        return "readout", "the default fit"
    reason = against_runs(recording)
    if reason is None:
        return "readout", f"on {recording.header.pipeline}, which the recording names"
    return "lstsq", f"not the default fit, a readout, since {reason}"


def against_runs(recording: Recording) -> str | None:
    """Why a fit cannot run the recorded pipeline by itself; None if it can."""
    header = recording.header
    if not header.states:
        return "the recording has no states"
    if not can_repeat(recording):
        return "the recording is of pictures or large tensors, of which it holds only a digest"
    if not header.pipeline:
        return "the recording does not name its pipeline and none is given"
    if not is_here(header.pipeline):
        return f"the recorded pipeline, {header.pipeline}, is not on this machine; give yours"
    return None


def is_here(name: str) -> bool:
    """Whether a pipeline can be loaded without a download."""
    if name.startswith("zoo:") or Path(name, INDEX_FILE).is_file():
        return True
    return bool(HUB_NAME.fullmatch(name)) and isinstance(
        try_to_load_from_cache(name, INDEX_FILE), str
    )


def recorded_pipeline(recording: Recording, method: str) -> str:
    """The name of the pipeline of a recording, for a method that runs it.

    Raises:
        ValueError: the recording does not name it, or it is not here.
    """
    reason = against_runs(recording)
    if reason is not None:
        raise ValueError(
            f"the method {method!r} runs the pipeline, and {reason}: pipeline=, or --pipeline. "
            "method='lstsq' needs no pipeline."
        )
    return recording.header.pipeline
