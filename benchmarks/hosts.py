"""The host table: what is proven on every family of diffusers pipelines, at tiny random size.

    python benchmarks/hosts.py [--hosts flux wan22 ...]

Builds the real pipeline class of each family around random weights (tests/families), then records,
replays, breaks off and detaches as `foreseer verify` does, fits L2P on a recording, exports it,
loads it and runs it, and counts the graphs of `compile_repeated_blocks(fullgraph=True)` with and
without forecasting. Writes `results/hosts.json` and `results/hosts.md`. Random weights prove
plumbing: no number here says anything about the quality of a picture.
"""

import argparse
import functools
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import torch
from torch._dynamo.utils import counters
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from families import FAMILIES, MORE, Family, call

from foreseer.checkpoints.format import load_predictor
from foreseer.evaluation.verify import (
    Replay,
    check_abort,
    check_detached,
    check_tap,
    final_latents,
    footprint,
    relative_error,
    same,
)
from foreseer.integration.forecasting import forecasting
from foreseer.integration.host.hosts import transformers_of
from foreseer.integration.session import Session
from foreseer.predictors.rules import Reuse
from foreseer.training.export import export_predictor
from foreseer.training.l2p import L2PLeastSquares
from foreseer.trajectories.datamodule import GramDataModule
from foreseer.trajectories.prompts import Item
from foreseer.trajectories.recorder import record
from foreseer.trajectories.recording import Recording

RESULTS = Path(__file__).parent / "results"
TAPS = ("output", "hidden")
ANCHORS = (0, 2, 5)
NUM_ITEMS = 6
HELD_OUT = (100, 101)  # seeds that are not recorded
COLUMNS = ("record_exact", "replay_exact", "fit_deployed", "after_abort_exact", "detach_clean")


def row_of(family: Family) -> dict[str, Any]:
    """One host's row."""
    pipe = family.build()
    experts = transformers_of(pipe)
    row: dict[str, Any] = {
        "host": family.host,
        "pipeline": type(pipe).__name__,
        "transformer": " + ".join(type(module).__name__ for module in experts.values()),
        "scheduler": type(pipe.scheduler).__name__,
    }
    row |= dict.fromkeys((*COLUMNS, "extra_graphs"))
    try:
        row |= exactness(pipe, lambda: call(family, pipe))
        row |= fitted(family)
    except ValueError as error:  # the host is refused: a row says so
        row["refused"] = str(error)
    row["extra_graphs"], row["compiled"] = extra_graphs(family)
    return row


def exactness(pipe: Any, run: Any) -> dict[str, Any]:
    """Recorded, replayed, broken off and detached, on both taps; all must hold on both."""
    expected = final_latents(pipe, run)
    before = footprint(pipe)
    checks = {check.name: check for tap in TAPS for check in check_tap(pipe, run, tap, expected)}
    refused = [c.found for c in checks.values() if c.passed is False and "no such tap" in c.found]
    if refused:
        raise ValueError(refused[-1])
    aborts = [check_abort(pipe, run, tap, expected) for tap in TAPS]
    detached = check_detached(pipe, before)
    after = same(final_latents(pipe, run), expected)
    return {
        "record_exact": all(bool(checks[f"record {tap}"].passed) for tap in TAPS),
        "replay_exact": all(bool(checks[f"replay {tap}"].passed) for tap in TAPS),
        "after_abort_exact": all(bool(check.passed) for check in aborts),
        "detach_clean": bool(detached.passed) and after,
        "state_bytes": {tap: state_bytes(pipe, run, tap) for tap in TAPS},
        **trunk_facts(pipe, run),
    }


def state_bytes(pipe: Any, run: Any, tap: str) -> int:
    """Bytes cached by a formula that keeps one anchor, as the run's report tells them."""
    with forecasting(pipe, Reuse(), ANCHORS, tap) as attached:
        run()
    return attached.report().state_bytes


def trunk_facts(pipe: Any, run: Any) -> dict[str, Any]:
    """Block lists and head, as traced."""
    session = Session(pipe, Replay("hidden"))
    try:
        run()
    finally:
        session.detach()
    trunk = next(iter(session.experts.values())).trunk
    return {} if trunk is None else {"blocks": list(trunk.block_lists), "head": trunk.head}


def fitted(family: Family) -> dict[str, Any]:
    """Record, fit, export, load and run a predictor on held-out noise, on both taps."""
    pipe = family.build()
    items = [Item(i, i, family.inputs(i)) for i in range(NUM_ITEMS)]
    errors = {}
    with tempfile.TemporaryDirectory() as folder:
        recording = record(pipe, items, f"{folder}/recording", batch_size=2, **family.settings)
        header = Recording(recording).header
        anchors = sorted({*ANCHORS, *header.expert_steps})
        again = functools.partial(call, family, pipe, HELD_OUT)
        expected = final_latents(pipe, again)
        deployed = True
        for tap in TAPS:
            module = fit(recording, anchors, tap)
            loaded = load_predictor(export_predictor(module, f"{folder}/{tap}", {}))
            with forecasting(pipe, loaded) as attached:
                final = final_latents(pipe, again)
            with forecasting(pipe, Reuse(), anchors, tap):
                rival = final_latents(pipe, again)
            errors[tap] = relative_error(final, expected)
            errors[f"{tap} reuse"] = relative_error(rival, expected)
            as_planned = attached.report().anchors == anchors
            deployed &= as_planned and bool(final.isfinite().all())
    return {
        "fit_deployed": deployed,
        "branches": header.num_branches,
        "expert_steps": header.expert_steps,
        "latent_error": errors,
    }


def fit(recording: Path, anchors: list[int], tap: str) -> L2PLeastSquares:
    """The least-squares rows, by the module that `foreseer fit` runs."""
    module = L2PLeastSquares(str(recording), anchors, tap)
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=GramDataModule(str(recording), tap, validation_fraction=0.0))
    return module


def extra_graphs(family: Family) -> tuple[int | None, str]:
    """Graphs that recording and forecasting add to compiled blocks, and what became of it."""
    pipe = family.build()
    torch._dynamo.reset()
    try:
        for transformer in transformers_of(pipe).values():
            transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    except ValueError:
        return None, "the class names no repeated blocks"
    try:
        expected = final_latents(pipe, lambda: call(family, pipe))
    except Exception as error:  # the class itself does not compile with fullgraph
        return None, f"does not compile by itself ({type(error).__name__})"
    before = counters["stats"]["unique_graphs"]
    try:
        found = replayed(pipe, family)
    except ValueError as error:
        return None, f"refused: {error}"
    extra = counters["stats"]["unique_graphs"] - before
    torch._dynamo.reset()
    return extra, "exact" if same(found, expected) else "NOT EXACT"


def replayed(pipe: Any, family: Family) -> Any:
    """The final latents of a run whose hidden tap is put back at every other step."""
    replay = Replay("hidden")
    session = Session(pipe, replay)
    try:
        call(family, pipe)
        replay.replay()
        return final_latents(pipe, functools.partial(call, family, pipe))
    finally:
        session.detach()


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    words = {True: "yes", False: "**no**", None: "-"}
    head = ("host", "pipeline", "recorded", "replayed", "fitted", "after abort", "detached")
    lines = [(*head, "extra graphs", "bytes per anchor, output / hidden")]
    lines.append(("---",) * len(lines[0]))
    for row in rows:
        graphs = "-" if row["extra_graphs"] is None else str(row["extra_graphs"])
        sizes = row.get("state_bytes", {})
        cells = [words[row[column]] for column in COLUMNS]
        size = " / ".join(f"{sizes[tap]:,}" for tap in TAPS if tap in sizes) or "-"
        lines.append((row["host"], row["pipeline"], *cells, graphs, size))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def rows_of(families: list[Family]) -> Iterator[dict[str, Any]]:
    """The rows, with a progress bar."""
    with tqdm(families, desc="hosts", unit="host") as bar:
        for family in bar:
            bar.set_postfix_str(family.host)
            yield row_of(family)


def main() -> None:
    """Run the command."""
    known = {**FAMILIES, **MORE}
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hosts", nargs="+", choices=list(known), default=list(known))
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "diffusers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    rows = list(rows_of([known[name] for name in arguments.hosts]))
    (arguments.out / "hosts.json").write_text(json.dumps(rows, indent=1) + "\n")
    (arguments.out / "hosts.md").write_text(table(rows))
    print(table(rows))
    exact = sum(all(row[column] is True for column in COLUMNS) for row in rows)
    print(f"{exact} of {len(rows)} hosts are exact in every column")
    for row in rows:
        if "refused" in row:
            print(f"{row['host']}: {row['refused']}")


if __name__ == "__main__":
    main()
