"""Every row of a benchmark against its rival, sample by sample."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

from foreseer.evaluation.metrics import paired
from foreseer.evaluation.results import BenchRow, Errors
from foreseer.trajectories.prompts import Item, content
from foreseer.trajectories.recording import Recording


def prompts_of(items: Sequence[Item]) -> list[int]:
    """A number of every item's prompt; of classes, which are few and all drawn, one of each item.

    Samples of one prompt are alike, so a bootstrap draws them together (metrics.py).
    """
    known: dict[Hashable, int] = {}
    found = []
    for item in items:
        told: Hashable = item.index
        if set(item.inputs) != {"class_labels"}:
            told = tuple((name, content(name, item.inputs[name])) for name in sorted(item.inputs))
        found.append(known.setdefault(told, len(known)))
    return found


def recorded_prompts(trajectories: Sequence[tuple[Recording, int]]) -> list[int]:
    """The same of recorded trajectories, by what their manifest lines say they were made from."""
    known: dict[Hashable, int] = {}
    found = []
    for recording, item in trajectories:
        inputs = {name: value for name, value in recording.meta(item).items() if name != "seed"}
        one_by_one = set(inputs) <= {"class_labels"}
        told = (str(recording.folder), item) if one_by_one else tuple(sorted(inputs.items()))
        found.append(known.setdefault(told, len(known)))
    return found


def is_learned(row: BenchRow) -> bool:
    """Whether a row is of a learned predictor: ours, against everything else."""
    return row.kind == "learned"


def with_rivals(
    rows: Sequence[BenchRow],
    errors: Sequence[Errors],
    prompts: Sequence[int],
    ours: Callable[[BenchRow], bool] = is_learned,
) -> list[BenchRow]:
    """The rows with their paired differences.

    With as many evaluations and at the same guidance, the rival of our rows is the best of all
    others, and that of others the best of ours; where a side has no row, the best row of another
    method. The best is that of the highest mean PSNR.

    Args:
        rows: of the same samples.
        errors: of every row's samples.
        prompts: of every sample, see `prompts_of`.
        ours: which rows are ours.
    """
    found = []
    for row, own in zip(rows, errors, strict=True):
        beside = [
            place
            for place, other in enumerate(rows)
            if "full" not in (row.kind, other.kind)
            and (other.guidance_scale, other.num_anchors) == (row.guidance_scale, row.num_anchors)
        ]
        rivals = [place for place in beside if ours(rows[place]) != ours(row)]
        rivals = rivals or [place for place in beside if rows[place].method != row.method]
        if not rivals:
            found.append(row)
            continue
        best = max(rivals, key=lambda place: rows[place].psnr_db)
        gap = paired(own["psnr_db"], errors[best]["psnr_db"], prompts)
        found.append(
            replace(
                row,
                rival=rows[best].method,
                paired_db=gap.mean,
                paired_low_db=gap.low,
                paired_high_db=gap.high,
                wins=gap.wins,
            )
        )
    return found
