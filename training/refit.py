"""Add recordings to a closed-form fit through its summed Grams.

The old trajectories are needed no more: their sum is beside the predictor. The rows are the least
squares of all trajectories together; rows that came from another fit, in closed loop say, are not
replaced by those, which would lose what that fit gained.
Shapes: n trajectories, P parts (1 of the whole feature), S sampling steps.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from foreseer.checkpoints.card import model_card
from foreseer.checkpoints.config import CONFIG_FILE
from foreseer.checkpoints.format import (
    CARD_FILE,
    GRAMS_FILE,
    MODEL_FILE,
    SEGMENTS_FILE,
    load_predictor,
    save_predictor,
)
from foreseer.checkpoints.hub import check_free, locate
from foreseer.checkpoints.spec import PredictorSpec
from foreseer.evaluation.measure import opened_for
from foreseer.evaluation.pairing import recorded_prompts
from foreseer.evaluation.verdict import Estimate, open_loop_line
from foreseer.predictors import LEARNED
from foreseer.predictors.base import LinearPredictor, Predictor
from foreseer.predictors.readout import Readout
from foreseer.predictors.rules import RULES, SHOWN
from foreseer.training.cross_validation import (
    RIDGES,
    CrossValidation,
    cross_validate,
    leave_one_out,
)
from foreseer.training.fits import recorded_pipeline
from foreseer.training.readout.readout_refit import refit_readout
from foreseer.training.shipped import (
    ShippedSums,
    check_extends,
    check_one_host,
    extended_spec,
    read_sums,
    write_sums,
)
from foreseer.trajectories.gram import GramBatches, relative_errors
from foreseer.trajectories.recording import Recording

OTHER_FIT = 0.2
"""How far, in open-loop errors of the closed form, rows may be from it to count as such a fit. Fits
on three of four trajectories or more are up to 0.07 away, bundled closed-loop fits 0.64 to 0.84."""

USUAL_RIDGES = (*RIDGES, 3e-3, 3e-2, 3e-1, 1.0, 3.0)
"""Of closed forms that rows are compared with; the steps are fine enough to be 0.05 apart."""

HOSTS = """
## Summed Grams

Least squares, ridge {ridge:g}, on the sum of {count} trajectories. `open_loop_error` is that of
rows solved without the trajectory they are tested on, over the {added} added last.

| weights | trajectories |
| --- | --- |
{hosts}
"""


@dataclass(frozen=True)
class Refit:
    """A predictor solved again, and what tells whether that was any good.

    Args:
        predictor: with `spec`.
        sums: all trajectories.
        validation: errors of the trajectories added, left out one by one.
        estimate: what its verdict is made of, on the same trajectories left out.
    """

    predictor: Predictor
    spec: PredictorSpec
    sums: ShippedSums
    validation: CrossValidation
    estimate: Estimate


def write_rows(
    predictor: str, recordings: Sequence[str], out: str, ridge: float | None = None
) -> None:
    """Refit, write the predictor and say what came of it; see `refit`."""
    found = refit(predictor, recordings, ridge)
    folder = save_predictor(found.predictor, found.spec, out, _card(found))
    write_sums(folder, [found.sums], found.spec.recording_digest)
    metrics, added = found.spec.metrics, len(found.validation.items)
    print("\n".join(found.validation.lines()))
    print(
        f"relative error on the {added} added: {metrics['open_loop_error']:.5f} with ridge "
        f"{metrics['ridge']:g}, before {metrics['before_open_loop_error']:.5f}; "
        + ", ".join(f"{rival} {metrics[f'open_loop_error_{rival}']:.5f}" for rival in SHOWN)
    )
    print(
        f"{out}: {added} trajectories of {', '.join(map(str, recordings))} added to "
        f"{found.sums.count - added} of {predictor}"
    )
    print(open_loop_line([found.estimate]))


def write_readout(
    old: Readout, name: str, recordings: Sequence[str], out: str, pipeline: Any
) -> None:
    """The same of a readout, whose new trajectories its pipeline runs; see `refit_readout`.

    Args:
        old: the readout.
        name: its folder, or `zoo:<name>`.
        recordings: folders or URLs.
        out: folder of the new one.
        pipeline: the recorded pipeline or its name; None loads the one that the recordings name.
    """
    if not recordings:
        raise ValueError("no recordings were given; name the folders to add.")
    folder = locate(name, None, (MODEL_FILE, CONFIG_FILE, CARD_FILE, GRAMS_FILE, SEGMENTS_FILE))
    first = Recording(recordings[0])
    check_free(out)  # before the walk, not after it
    pipe = opened_for(first, pipeline or recorded_pipeline(first, "readout"))
    batch_size = int(first.header.recipe.get("batch_size", 1))
    found = refit_readout(old, folder, recordings, pipe, batch_size)
    found.save(out)
    gains = ", ".join(f"{gain:+.2f}" for gain in found.gains)
    print(
        f"{out}: {found.added} trajectories of {', '.join(map(str, recordings))} added to "
        f"{found.spec.num_trajectories - found.added} of {name}; error of each segment on left-out "
        f"prompts of the last recording, against {name}: {gains} dB"
    )


def refit(name: str, recordings: Sequence[str | Path], ridge: float | None = None) -> Refit:
    """Solve a predictor's rows again on its own trajectories and those of recordings.

    Args:
        name: of the predictor: a folder, `zoo:<name>` or a hub repository.
        recordings: folders or URLs; all of one host, whose weights may be others than those of the
            predictor: the new one is then of that host.
        ridge: shrinkage toward reuse, relative to each feature's squared norm; None takes the one
            with the least error on the trajectories added, each left out in turn.

    Raises:
        CheckpointError: the predictor has no sums, or they are not its own.
        ValueError: the predictor is of a kind or fit that no sum determines, a recording is of
            other circumstances, or some of its trajectories are in the sums already.
    """
    old = load_predictor(name)
    if not isinstance(old, LinearPredictor) or not old.from_grams:
        raise ValueError(
            f"{name} is a {type(old).__name__}, expected one of "
            f"{[kind.__name__ for kind in LEARNED if kind.from_grams]}: a sum of Grams determines "
            "no other. Fit it "
            "on the recordings with `foreseer fit`."
        )
    if not recordings:
        raise ValueError("no recordings were given; name the folders to add.")
    parts = old.partition
    folder = locate(name, None, (MODEL_FILE, CONFIG_FILE, CARD_FILE, GRAMS_FILE))
    sums = read_sums(folder, old.spec, None if parts is None else parts.num_parts)
    gram = list(sums.grams)[-1]  # of the parts, where there are any
    check_closed_form(name, old, _with_parts(sums.grams[gram], parts is not None))
    opened = [Recording(place) for place in recordings]
    for recording in opened:
        check_extends(old.spec, recording, gram, None if parts is None else parts.describe())
        check_one_host(opened[0], recording)
        sums = sums.plus(recording)
    total = _with_parts(sums.grams[gram], parts is not None)
    validation = cross_validate(
        total,
        _chunks(opened, gram, parts is not None),
        old.spec.anchors,
        RIDGES if ridge is None else [ridge],
        old.spec.expert_steps,
        old.window,
    )
    new = old.refitted(total, sums.count, validation.ridge)
    metrics = {
        "open_loop_error": float(validation.errors[_place(validation)].mean()),
        "ridge": validation.ridge,
        **formula_errors(old, _chunks(opened, gram, parts is not None)),
    }
    added = [(recording, item) for recording in opened for item in recording.items]
    chunks = _chunks(opened, gram, parts is not None)
    prompts = recorded_prompts(added)
    left_out = leave_one_out(old, total, sums.count, validation.ridge, chunks, prompts)
    spec = extended_spec(
        old.spec, [recording.header for recording in opened], sums, metrics | left_out.metrics()
    )
    return Refit(new, spec, sums, validation, left_out)


def _place(validation: CrossValidation) -> int:
    return validation.ridges.index(validation.ridge)


def _chunks(
    recordings: Sequence[Recording], gram: str, parted: bool
) -> Iterator[tuple[list[str], Tensor]]:
    """Names and Grams (n, branches, P, S, S) of all trajectories, some at a time."""
    for recording in recordings:
        for batch in GramBatches(recording, gram, recording.items):
            names = [f"item {item} of {recording.folder}" for item in batch["items"]]
            yield names, _with_parts(batch["gram"], parted)


def _with_parts(gram: Tensor, parted: bool) -> Tensor:
    return gram if parted else gram.unsqueeze(-3)


def check_closed_form(
    name: str, old: LinearPredictor, total: Float[Tensor, "branches P S S"]
) -> None:
    """Raise unless a predictor's rows are about the closed form of its own sum.

    Args:
        name: of the predictor.
        old: determined by Grams, with `spec`.
        total: its summed Grams.

    Raises:
        ValueError: they come from another fit.
    """
    if old.any_anchors:
        return  # solves while sampling
    run = old.spec.anchors, old.spec.sigmas, old.spec.expert_steps
    rows, unit = old.rows(*run), torch.eye(total.shape[-1], dtype=torch.float64)
    distances = []
    for strength in USUAL_RIDGES:
        form = old.refitted(total, 1, strength).rows(*run)
        apart = relative_errors(total, unit + form - rows).mean()  # of the two forecasts
        distances.append(float(apart / relative_errors(total, form).mean().clamp_min(1e-6)))
    if min(distances) > OTHER_FIT:
        raise ValueError(
            f"the forecasts of {name} are {min(distances):.2f} open-loop errors away from those of "
            f"the closed form of its own sum of Grams, expected at most {OTHER_FIT}: it was fitted "
            "otherwise (in closed loop, by Adam), and least squares would lose what that gained. "
            "Fit again with `foreseer fit` on all recordings, or refit a least-squares predictor."
        )


def formula_errors(
    old: LinearPredictor, chunks: Iterator[tuple[list[str], Float[Tensor, "n branches P S S"]]]
) -> dict[str, float]:
    """Mean relative errors of the old predictor and the formulas, measured as the new one's."""
    anchors, sigmas, steps = old.spec.anchors, old.spec.sigmas, old.spec.expert_steps
    rows = {"before_open_loop_error": old.rows(anchors, sigmas, steps)}
    for rival in SHOWN:
        rows[f"open_loop_error_{rival}"] = RULES[rival].rows(anchors, sigmas, steps)
    totals, count = dict.fromkeys(rows, 0.0), 0
    for _, grams in chunks:
        count += len(grams)
        for name, table in rows.items():
            totals[name] += float(relative_errors(grams, table).mean((1, 2)).sum())
    return {name: total / count for name, total in totals.items()}


def _card(found: Refit) -> str:
    """The model card, with the hosts of the sums."""
    hosts = "\n".join(f"| {host} | {count} |" for host, count in found.sums.hosts.items())
    told = HOSTS.format(
        ridge=found.validation.ridge,
        count=found.sums.count,
        added=len(found.validation.items),
        hosts=hosts,
    )
    return model_card(found.predictor, found.spec) + told
