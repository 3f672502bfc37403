"""The best anchors of every method for a number of evaluations, in closed loop.

Every method is given the same effort: the same candidate lists, as many lists from its own search
on Grams, the same number of single moves, the same calibration samples. Other searches are told
with the network evaluations that they spend.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
import xxhash
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from foreseer.errors import RecordingError
from foreseer.evaluation.measure import References, closed_loop_errors, log_error
from foreseer.evaluation.published_search import annealed, shortest_path
from foreseer.evaluation.search import Found, beam_search, closed_loop_search, start_lists
from foreseer.evaluation.solvers import SOLVERS, sampling_with, solver_scheduler
from foreseer.predictors.rules import RULES
from foreseer.predictors.solve import least_squares_rows
from foreseer.training.plumbing.progress import QUIET_SECONDS
from foreseer.training.readout.readout_runs import held_out_error
from foreseer.training.tracking import track
from foreseer.trajectories.prompts import generate_batch
from foreseer.trajectories.recording import Recording

SEARCH = "search"  # what a file's lists were searched on, beside them
EFFORT = "effort"  # what each list took, in words, for the report of a benchmark
NUM_OPEN_LOOP = 3  # lists taken from the search on Grams
RUNS_PER_LIST = {"l2p_closed_loop": 2}  # of every sample: it is tracked, then measured

Algorithm: TypeAlias = Literal["beam", "dpcache", "budcache"]
"""How lists are searched: ours, or as published (`evaluation.published_search`)."""


def search_anchors(
    pipe: Any,
    references: References,
    method: str,
    tap: str,
    num_anchors: int,
    num_moves: int = 8,
    algorithm: Algorithm = "beam",
) -> list[Found]:
    """Rank anchor lists of one method by closed-loop error on calibration samples.

    Every list costs `num_anchors` network evaluations per sample and guidance branch, and
    `l2p_closed_loop` twice that.

    Args:
        pipe: the pipeline.
        references: calibration samples of a recording.
        method: a solver (`euler`, `ab2`, `dpmpp_2m`, `unipc`), a formula (`reuse`, ...),
            `l2p_lstsq`, `l2p_closed_loop` (tracked rows on the `output` tap), or `readout`, fitted
            on three of four samples for every list and measured on the others: give it 256.
        tap: `output` or `hidden`; `none` for a solver.
        num_anchors: network evaluations.
        num_moves: lists that `beam` tries by moving single anchors of the best one.
        algorithm: `beam` is ours. `dpcache` has the exact dynamic programme on Grams, with the
            first three steps forced, as published, and with step 0 alone. `budcache` anneals.

    Returns:
        Everything evaluated, best first.

    Raises:
        ValueError: the method or algorithm is unknown, or the method none that `dpcache` is for.
    """
    evaluate = evaluator(pipe, references, method, tap)
    num_steps = len(references.recording.header.sigmas)
    starts: list[tuple[int, ...]] = []
    if algorithm != "budcache":
        starts = _open_loop_lists(references.recording, method, tap, num_anchors, algorithm)
    total = {"beam": len(starts) + num_moves, "dpcache": len(starts)}.get(algorithm)
    options: dict[str, Any] = {"desc": f"{method} {tap}", "unit": "list", "leave": False}
    with tqdm(total=total, delay=QUIET_SECONDS, **options) as bar:
        counted = partial(_counted, evaluate, bar)
        if algorithm == "budcache":
            return annealed(counted, num_anchors, num_steps)
        moves = num_moves if algorithm == "beam" else 0
        return closed_loop_search(counted, starts, num_steps, moves)


def _open_loop_lists(
    recording: Recording, method: str, tap: str, num_anchors: int, algorithm: Algorithm
) -> list[tuple[int, ...]]:
    """The lists that an algorithm finds on Grams, and for ours the common ones before them."""
    sigmas = recording.header.sigmas
    grams = recording.stack(f"gram/{tap if tap != 'none' else 'output'}")
    if algorithm == "beam":
        rule = RULES.get(method, RULES["newton_1"])
        lists = start_lists(num_anchors, len(sigmas))
        lists += beam_search(grams, sigmas, num_anchors, rule)[:NUM_OPEN_LOOP]
    elif method in RULES:
        forced = (min(3, num_anchors), 1)
        lists = [shortest_path(grams, sigmas, num_anchors, RULES[method], n) for n in forced]
    else:
        raise ValueError(f"dpcache sums the errors of a formula's forecasts; {method!r} is none.")
    return list(dict.fromkeys(lists))


def _counted(
    evaluate: Callable[[tuple[int, ...]], float], bar: Any, anchors: tuple[int, ...]
) -> float:
    error = evaluate(anchors)
    bar.update()
    return error


def evaluator(
    pipe: Any, references: References, method: str, tap: str
) -> Callable[[tuple[int, ...]], float]:
    """The closed-loop error in dB of a method as a function of its anchors.

    Raises:
        ValueError: the method is unknown.
    """
    sigmas = references.recording.header.sigmas
    branches = references.recording.header.num_branches

    def of_rows(anchors: tuple[int, ...], rows: Float[Tensor, "branches S S"]) -> float:
        errors = closed_loop_errors(
            pipe, rows, anchors, tap, references.batches, references.finals, **references.settings
        )
        return float(errors.mean())

    def formula(name: str, anchors: tuple[int, ...]) -> Float[Tensor, "branches S S"]:
        return RULES[name].rows(anchors, sigmas)[:, 0].repeat(branches, 1, 1)

    def of_solver(anchors: tuple[int, ...]) -> float:
        latents = solve(pipe, method, [sigmas[a] for a in anchors], references)
        return float(log_error(latents, references.finals).mean())

    def of_formula(anchors: tuple[int, ...]) -> float:
        return of_rows(anchors, formula(method, anchors))

    def of_tracking(anchors: tuple[int, ...]) -> float:
        start = formula("newton_1", anchors)
        rows, _ = track(
            pipe, references.batches, references.states, anchors, start, **references.settings
        )
        return of_rows(anchors, rows)

    def of_least_squares(anchors: tuple[int, ...]) -> float:
        return of_rows(anchors, least_squares_rows(grams.sum(0), anchors))

    def of_readout(anchors: tuple[int, ...]) -> float:
        items = references.items
        return held_out_error(pipe, str(references.recording.folder), anchors, len(items))

    if method == "readout" and tap == "output":
        return of_readout
    if method == "l2p_lstsq":
        grams = references.recording.stack(f"gram/{tap}")
        return of_least_squares
    if method in SOLVERS:
        return of_solver
    if method in RULES:
        return of_formula
    if method == "l2p_closed_loop" and tap == "output":
        return of_tracking
    raise ValueError(
        f"no search for {method!r} on the tap {tap!r}; known are "
        f"{', '.join([*SOLVERS, *RULES])}, l2p_lstsq, and l2p_closed_loop and readout on `output`."
    )


def solve(pipe: Any, solver: str, sigmas: Sequence[float], references: References) -> Tensor:
    """Final latents of a few-step solver on the calibration samples."""
    settings = {**references.settings, "num_inference_steps": len(sigmas)}
    latents = []
    with sampling_with(pipe, solver_scheduler(solver, sigmas)), torch.no_grad():
        for batch in references.batches:
            latents.append(generate_batch(pipe, batch, output_type="latent", **settings)[0])
    return torch.cat(latents).cpu()


def check_one_transformer(recording: Recording) -> None:
    """Raise unless one transformer made a recording.

    Raises:
        ValueError: several took turns in its runs.
    """
    starts = recording.header.expert_steps
    if len(starts) > 1:
        raise ValueError(
            f"{recording.folder} is of {len(starts)} transformers that start at the steps "
            f"{starts}; lists are tried in closed loop for one only. `foreseer inspect` finds "
            "lists for several, on their Grams."
        )


def search_lists(
    pipe: Any,
    references: References,
    wanted: Sequence[str],
    num_moves: int,
    path: Path,
    algorithm: Algorithm = "beam",
) -> dict[str, list[int]]:
    """Search every list that a file does not hold yet, and write each as it is found.

    What each has cost is printed beside it: lists tried, and network evaluations of one guidance
    branch.

    Args:
        pipe: the recorded pipeline.
        references: calibration samples of the recording.
        wanted: `method|tap|num_anchors` of each.
        num_moves: lists that `beam` tries by moving single anchors.
        path: JSON file.
        algorithm: see `search_anchors`.

    Raises:
        RecordingError: the file holds the lists of another search.
        ValueError: the algorithm is unknown.
    """
    if algorithm not in get_args(Algorithm):
        raise ValueError(
            f"algorithm is {algorithm!r}, expected one of {', '.join(get_args(Algorithm))}."
        )
    told = f"{references.recording.header.recipe_hash} {references.items} {num_moves}"
    if algorithm != "beam":
        told += f" {algorithm}"
    made = xxhash.xxh3_128(told.encode()).hexdigest()
    found, effort = begun(path, made)
    for key in tqdm(wanted, desc="search", unit="list"):
        if key in found:
            continue
        method, tap, budget = key.split("|")
        tried = search_anchors(pipe, references, method, tap, int(budget), num_moves, algorithm)
        anchors, error = tried[0]
        found[key] = list(anchors)
        runs = len(tried) * RUNS_PER_LIST.get(method, 1) * len(references.items)
        effort[key] = (
            f"{len(tried)} lists tried on {len(references.items)} samples, {runs * int(budget)} "
            "network evaluations"
        )
        tqdm.write(f"{key}: {' '.join(map(str, anchors))} at {error:.2f} dB; {effort[key]}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({SEARCH: made, EFFORT: effort} | found, indent=1) + "\n")
    return found


def begun(path: Path, made: str) -> tuple[dict[str, list[int]], dict[str, str]]:
    """The lists a search has found so far, and what each took, which older files do not say.

    Args:
        path: the file they are written to.
        made: digest of the recording, its trajectories compared on, and the moves.

    Raises:
        RecordingError: the file is of another search.
    """
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {SEARCH: made}
    if found.pop(SEARCH, None) != made:
        raise RecordingError(
            f"{path} holds the lists of another recording, or of another number of samples or "
            "moves, or of another algorithm; expected those of this search. Give another file with "
            "out."
        )
    return found, found.pop(EFFORT, {})
