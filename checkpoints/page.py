"""What a predictor's page on the hub shows beyond its card: pictures, a benchmark, a licence."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foreseer.checkpoints.card import HOW_FAR, HOW_FAST, NOT_MEASURED, fewer, table
from foreseer.checkpoints.config import CheckpointError
from foreseer.checkpoints.spec import PredictorSpec

COLUMNS = ("method", "num_anchors", "psnr_db", "psnr_ci_low", "psnr_ci_high", "ssim")
SECTION = "## Benchmark"

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """What `foreseer bench` measured.

    Args:
        rows: its rows as dicts, the full run among them.
        machine: where, in words.
        picture: the contact sheet; None where there is none.
    """

    rows: Sequence[Row]
    machine: str
    picture: Path | None


def with_pictures(card: str, names: Sequence[str]) -> str:
    """A card that shows pictures beside it, each once.

    Args:
        card: its text.
        names: of the pictures.
    """
    missing = [name for name in names if f"]({name})" not in card]
    shown = "\n\n".join(f"![{name}]({name})" for name in missing)
    return f"{card.rstrip()}\n\n## Pictures\n\n{shown}\n" if missing else card


def with_licence(card: str, licence: str) -> str:
    """A card with another licence in its head.

    Args:
        card: its text.
        licence: as the hub calls it, such as `apache-2.0` or `other`.
    """
    from huggingface_hub import ModelCard

    read: Any = ModelCard(card)
    read.data.license = licence
    return str(read)


def base_model_of(card: str) -> str | None:
    """The hub model that the head of a card says the predictor is for; None where it says none."""
    from huggingface_hub import ModelCard

    data: Any = ModelCard(card).data
    named = data.get("base_model")
    return named if isinstance(named, str) else None


def with_benchmark(card: str, specs: Sequence[PredictorSpec], benchmark: Benchmark) -> str:
    """A card whose answers, results and tables are those of a benchmark.

    Args:
        card: its text, of one predictor or of several.
        specs: of the predictors.
        benchmark: it has a row of each.

    Raises:
        CheckpointError: it has none, or several, of a predictor.
    """
    from huggingface_hub import EvalResult, ModelCard

    full = next((row for row in benchmark.rows if row["kind"] == "full"), None)
    own = [_own_row(spec, benchmark.rows) for spec in specs]
    read: Any = ModelCard(card)
    found = [
        EvalResult(
            task_type="image-generation",
            dataset_type="benchmark",
            dataset_name=f"{row['num_samples']} held-out samples against the full run, "
            f"{row['num_anchors']} of {len(spec.sigmas)} evaluations",
            metric_type=name,
            metric_value=row[name],
            metric_name=name,
        )
        for spec, row in zip(specs, own, strict=True)
        for name in ("psnr_db", "ssim")
    ]
    read.data.eval_results = [*(read.data.eval_results or ()), *found]
    read.data.model_name = read.data.model_name or "foreseer predictor"
    fast = [_fast(spec, row, full) for spec, row in zip(specs, own, strict=True)]
    text = _answered(str(read), HOW_FAST, fast)
    text = _answered(text, HOW_FAR, [_far(row) for row in own])
    counts = {row["num_anchors"] for row in own}
    near = [row for row in benchmark.rows if row["num_anchors"] in counts or row is full]
    cells = [[_cell(row.get(column)) for column in COLUMNS] for row in near]
    told = f"{SECTION}\n\n{table(COLUMNS, cells)}\n\nOn {benchmark.machine}.\n"
    return f"{text.partition(SECTION)[0].rstrip()}\n\n{told}"


def _own_row(spec: PredictorSpec, rows: Sequence[Row]) -> Row:
    anchors = " ".join(map(str, spec.anchors))
    learned = [row for row in rows if row["kind"] == "learned"]
    found = [
        row
        for row in learned
        if (row["tap"], row["anchors"]) == (spec.tap, anchors)
        and abs(row["guidance_scale"] - spec.guidance_scale) < 1e-6
    ]
    if len(found) != 1:
        there = "; ".join(f"{row['method']}: {row['tap']}, {row['anchors']}" for row in learned)
        raise CheckpointError(
            f"the benchmark has {len(found)} rows of this predictor (tap {spec.tap}, anchors "
            f"{anchors}, guidance_scale {spec.guidance_scale:g}), expected one; it has "
            f"{there or 'no learned predictor'}. Run `foreseer bench` with this one among its "
            "predictors."
        )
    return found[0]


def _fast(spec: PredictorSpec, row: Row, full: Row | None) -> str:
    seconds = [None if each is None else each.get("seconds_per_image") for each in (full, row)]
    if seconds[0] and seconds[1]:
        return f"{fewer(spec)}, {seconds[0] / seconds[1]:.1f} x faster on the machine below"
    return f"{fewer(spec)}; seconds {NOT_MEASURED}"


def _far(row: Row) -> str:
    low, high = row["psnr_ci_low"], row["psnr_ci_high"]
    return (
        f"PSNR {row['psnr_db']:.2f} dB ({low:.2f} to {high:.2f}), SSIM {row['ssim']:.4f}, "
        f"{row['num_samples']} held-out samples at {row['num_anchors']} evaluations"
    )


def _answered(card: str, question: str, told: Sequence[str]) -> str:
    line = f"| {question} | {'; '.join(told)} |"
    found, count = re.subn(rf"^\| {question} \|.*$", lambda _: line, card, flags=re.MULTILINE)
    if count:
        return found
    raise CheckpointError(
        f"the card has no line {question!r} to put the benchmark's answer into; save the "
        "predictor again with this release, and edit its card afterwards."
    )


def _cell(value: Any) -> str:
    if value is None:
        return NOT_MEASURED
    return f"{value:.4g}" if isinstance(value, float) else str(value)
