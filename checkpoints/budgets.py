"""Predictors for several numbers of network evaluations in one folder.

Each is a checkpoint of its own in a folder named by its number, so every tool that takes a
predictor takes `FOLDER/8`; `budgets.json` says which there are, and the card what each is worth.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from foreseer.checkpoints.card import answers, card_head
from foreseer.checkpoints.config import CONFIG_FILE, CheckpointError, is_int, is_list
from foreseer.checkpoints.hub import (
    CARD_FILE,
    MODEL_FILE,
    check_free,
    check_holds,
    download,
    is_remote,
    replace_file,
)
from foreseer.checkpoints.spec import PredictorSpec
from foreseer.checkpoints.strict import parse_json

BUDGETS_FILE = "budgets.json"
MAX_BYTES = 4096
MAX_BUDGETS = 64
MAX_EVALUATIONS = 4096
VERSION = 1

CARD = """---
{head}
---

# Predictor for {count} numbers of network evaluations

{answers}

```python
import foreseer as fs

with fs.forecasting(pipe, "THIS FOLDER OR REPOSITORY", evaluations={first}) as run:
    image = pipe(prompt).images[0]
```

What each is worth, as measured when it was fitted (errors in dB: lower is better):

| {names} |
|{rule}|
{rows}
"""


def check_free_of_others(folder: str | Path, budgets: Sequence[int]) -> None:
    """Raise unless a folder is new, empty or holds predictors for several budgets.

    Args:
        folder: where they are to lie.
        budgets: those to be written.

    Raises:
        CheckpointError: it holds anything else, or is a file.
    """
    folder = Path(folder)
    check_holds(folder, (BUDGETS_FILE, CARD_FILE, *map(str, budgets)))
    for budget in budgets:
        check_free(folder / str(budget))


def write_budgets(folder: str | Path, specs: Mapping[int, PredictorSpec]) -> None:
    """Say which budgets lie in a folder, and what each is worth, once all are there.

    Args:
        folder: where every predictor lies in `folder/<evaluations>`.
        specs: theirs, by evaluations.
    """
    folder = Path(folder)
    budgets = sorted(specs)
    metrics = sorted(set.intersection(*(set(spec.metrics) for spec in specs.values())))
    names = ["evaluations", "steps", "trajectories", *metrics]
    rows = []
    for budget in budgets:
        spec = specs[budget]
        told = [budget, len(spec.sigmas), spec.num_trajectories]
        cells = [*map(str, told), *(f"{spec.metrics[name]:.2f}" for name in metrics)]
        rows.append(f"| {' | '.join(cells)} |")
    card = CARD.format(
        head=card_head("Predictors", "several-budgets", {n: specs[n] for n in budgets}),
        answers=answers([specs[n] for n in budgets]),
        count=len(budgets),
        first=budgets[0],
        names=" | ".join(names),
        rule=" --- |" * len(names),
        rows="\n".join(rows),
    )
    replace_file(folder / CARD_FILE, card.encode())
    told_budgets = {"schema_version": VERSION, "evaluations": budgets}
    replace_file(folder / BUDGETS_FILE, (json.dumps(told_budgets) + "\n").encode())


def is_budget(value: object) -> bool:
    """Whether a value can be a number of network evaluations."""
    return is_int(value) and 1 <= value <= MAX_EVALUATIONS  # type: ignore[operator]


def read_budgets(folder: Path) -> list[int] | None:
    """The budgets of a folder, ascending; None where it says nothing of several.

    Raises:
        CheckpointError: what it says is malformed.
    """
    path = folder / BUDGETS_FILE
    if not path.is_file():
        return None
    text = path.read_bytes()[: MAX_BYTES + 1]
    try:
        values: Any = parse_json(text.decode()) if len(text) <= MAX_BYTES else None
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON ({error}); save the predictors again.") from error
    found = values.get("evaluations", ()) if isinstance(values, dict) else ()
    if not is_list(found, is_budget, 1, MAX_BUDGETS) or sorted(set(found)) != found:
        raise CheckpointError(
            f"{path} holds {str(values)[:80]}, expected schema_version {VERSION} and evaluations, "
            f"1 to {MAX_BUDGETS} ascending numbers; save the predictors again."
        )
    if values.get("schema_version") != VERSION:
        raise CheckpointError(
            f"{path} has schema_version {str(values.get('schema_version'))[:20]}, this release "
            f"reads {VERSION}; upgrade foreseer (pip install --upgrade foreseer)."
        )
    return found


def budget_folder(
    folder: Path, name: str | Path, revision: str | None, evaluations: int | None
) -> Path:
    """The folder of the predictor for a number of evaluations, fetched if need be.

    Args:
        folder: of a predictor, or of several.
        name: by which it was asked for.
        revision: branch, tag or commit where that is a hub repository.
        evaluations: network evaluations; None where there is one predictor.

    Raises:
        CheckpointError: there are several and none is named, or none for this number.
    """
    budgets = read_budgets(folder)
    if budgets is None:
        return folder
    if evaluations not in budgets:
        listed = ", ".join(map(str, budgets))
        raise CheckpointError(
            f"{name} holds predictors for {listed} evaluations, asked for {evaluations}; say "
            f"evaluations={budgets[-1]}, or name {name}/{budgets[-1]} where it is a folder."
        )
    if is_remote(name):
        files = [f"{evaluations}/{file}" for file in (MODEL_FILE, CONFIG_FILE, CARD_FILE)]
        folder = download(str(name), revision, files)
    return folder / str(evaluations)
