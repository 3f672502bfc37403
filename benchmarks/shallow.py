"""Shallow steps against plain anchors at the same cost, on a U-Net and on a chain of blocks.

    python benchmarks/shallow.py --hosts '[fashion_unet, fashion_dit]'
    python benchmarks/shallow_page.py

Rows are fitted on trajectories that were recorded, on lists that nothing was chosen for (uniform);
judged are (label, seed) pairs that were never recorded. Costs are in full steps, a shallow one by
its share of FLOPs, convolutions included. Samples that were drawn are kept and not drawn again.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from torch import Tensor

from foreseer.evaluation.metrics import paired, psnr, summarise
from foreseer.evaluation.timing import first_call, step_flops
from foreseer.integration.forecasting import forecasting
from foreseer.integration.host.hosts import transformer_of
from foreseer.integration.pipelines.load import load_pipeline
from foreseer.integration.schedule import Shallow, uniform
from foreseer.predictors.rules import RULES
from foreseer.training.least_squares import fit_rows
from foreseer.trajectories.prompts import Item, generate_batch
from foreseer.trajectories.recorder import record
from foreseer.trajectories.recording import Recording

ROOT, RESULT = Path("runs/shallow"), Path("benchmarks/results/dato.json")
PIPELINES = {"fashion_unet": "examples/fashion_unet", "fashion_dit": "zoo:fashion_dit"}
STEPS, CLASSES, FULL, JUDGED_FROM = 50, 10, 8, 100_000
CALL = {"guidance_scale": 3.0, "num_inference_steps": STEPS}
FORMULAS = ("reuse", "taylor_1")


def items(first: int, count: int) -> list[Item]:
    """Classes in turn, item i with seed i."""
    return [Item(i, i, {"class_labels": i % CLASSES}) for i in range(first, first + count)]


def drawn(pipe: Any, batches: Sequence[Sequence[Item]]) -> Tensor:
    """Pictures in [0, 1]."""
    made = [generate_batch(pipe, each, output_type="pt", **CALL).images for each in batches]
    return torch.cat(made).clamp(0, 1)


def spread(full: Sequence[int], count: int) -> list[int]:
    """Steps in the middles of the widest gaps of a list."""
    listed = list(full)
    for _ in range(count):
        ends = [*sorted(listed), STEPS]
        gap, start = max((b - a, -a) for a, b in zip(ends, ends[1:], strict=False))
        listed.append(-start + gap // 2)
    return sorted(set(listed) - set(full))


def entries(found: Recording, share: dict[str, float]) -> dict[str, dict[str, Any]]:
    """What is compared, by name: what `forecasting` is given, and the cost in full steps."""
    made: dict[str, dict[str, Any]] = {}
    full = uniform(FULL, STEPS)
    for tap in ("deep.1", "deep.2"):
        cost = FULL + share[tap] * (STEPS - FULL)
        for name in FORMULAS:
            made[f"{name} on {tap}"] = dict(of=RULES[name], anchors=full, tap=tap, cost=cost)
        rows = fit_rows(found, full, tap)
        made[f"rows on {tap}"] = dict(of=rows, anchors=full, tap=tap, cost=cost)
    same = round(FULL + share["deep.1"] * (STEPS - FULL))
    for count in (FULL, same):
        plain = uniform(count, STEPS)
        for name in ("reuse", "taylor_1"):
            label = f"{'Euler' if name == 'reuse' else name}, {count} anchors"
            made[label] = dict(of=RULES[name], anchors=plain, tap="output", cost=count)
        rows = fit_rows(found, plain, "output")
        made[f"rows, {count} anchors"] = dict(of=rows, anchors=plain, tap="output", cost=count)
    for less in (1, 2):
        kept = uniform(FULL - less, STEPS)
        steps = spread(kept, int(less / share["deep.1"]))
        evaluated = tuple(sorted({*kept, *steps}))
        cost = len(kept) + share["deep.1"] * len(steps)
        deep = Shallow(steps, fit_rows(found, kept, "deep.1"), "deep.1")
        between = fit_rows(found, evaluated, "output")
        made[f"three kinds, {len(kept)} full and {len(steps)} shallow"] = dict(
            of=between, anchors=evaluated, tap="output", cost=cost, shallow=deep
        )
    return made


def shares(pipe: Any) -> dict[str, float]:
    """FLOPs of a shallow step in those of a full one, by tap."""
    network = transformer_of(pipe)
    call = first_call(network, lambda: generate_batch(pipe, items(0, 1), **CALL))
    cost = {tap: step_flops(network, call, tap) for tap in ("deep.1", "deep.2")}
    return {tap: each.base / each.full for tap, each in cost.items()}


def bench(
    hosts: Sequence[str] = tuple(PIPELINES), num_samples: int = 64, num_trajectories: int = 64
) -> None:
    """Record, fit, draw and compare, and write the rows as they come.

    Args:
        hosts: of `PIPELINES`.
        num_samples: judged samples.
        num_trajectories: recorded ones.
    """
    for host in hosts:
        pipe = load_pipeline(PIPELINES[host])
        pipe.set_progress_bar_config(disable=True)
        folder = ROOT / host
        taps = ("deep.1", "deep.2", "output")
        record(
            pipe, items(0, num_trajectories), folder / "recording", taps=taps, states=False, **CALL
        )
        judged = items(JUDGED_FROM, num_samples)
        batches = [judged[i : i + 16] for i in range(0, num_samples, 16)]
        found, share = Recording(folder / "recording"), shares(pipe)
        whole = kept(folder / f"full_{num_samples}.pt", pipe, batches, None)
        errors: dict[str, Tensor] = {}
        made = entries(found, share)
        for name, each in made.items():
            path = folder / f"{name.replace(' ', '_')}_{num_samples}.pt"
            errors[name] = psnr(kept(path, pipe, batches, each), whole)
            print(f"{host} {name}: {float(errors[name].mean()):.2f} dB", flush=True)
        write(host, made, errors, share, num_trajectories)


def kept(
    path: Path, pipe: Any, batches: Sequence[Sequence[Item]], entry: dict[str, Any] | None
) -> Tensor:
    """The pictures of an entry, or of the full run; from their file where they were drawn."""
    if path.exists():
        return torch.load(path)
    if entry is None:
        found = drawn(pipe, batches)
    else:
        more = {"shallow": entry["shallow"]} if "shallow" in entry else {}
        tap = None if entry["of"].learned else entry["tap"]
        with forecasting(pipe, entry["of"], entry["anchors"], tap, **more):
            found = drawn(pipe, batches)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(found, path)
    return found


def write(
    host: str,
    made: dict[str, dict[str, Any]],
    errors: dict[str, Tensor],
    share: dict[str, float],
    num_trajectories: int,
) -> None:
    """Put a host's rows into the results, each paired with its rival."""
    told = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    rows = [row for row in told.get("shallow", []) if row["host"] != host]
    plain = {n: e for n, e in made.items() if e["tap"] == "output" and "shallow" not in e}
    for name, each in made.items():
        rival = rival_of(name, each, plain, errors)
        compared = paired(errors[name], errors[rival])
        summary = summarise(errors[name])
        rows.append(
            {
                "host": host,
                "method": name,
                "tap": each["tap"],
                "anchors": " ".join(map(str, each["anchors"])),
                "shallow": " ".join(map(str, each["shallow"].steps)) if "shallow" in each else "",
                "evaluations": each["cost"],
                "share": share.get(each["tap"], share["deep.1"] if "shallow" in each else 0.0),
                "psnr": summary.mean,
                "p10": float(errors[name].quantile(0.1)),
                "rival": rival,
                "paired_db": compared.mean,
                "paired_low_db": compared.low,
                "paired_high_db": compared.high,
                "wins": compared.wins,
                "num_samples": len(errors[name]),
                "num_trajectories": num_trajectories,
            }
        )
    RESULT.write_text(json.dumps(told | {"shallow": rows}, indent=1) + "\n")


def rival_of(
    name: str,
    entry: dict[str, Any],
    plain: dict[str, dict[str, Any]],
    errors: dict[str, Tensor],
) -> str:
    """Rows on a deep tap: reuse there. All others: the best plain list of no higher cost."""
    if name.startswith("rows on"):
        return f"reuse on {entry['tap']}"
    most = entry["cost"] + 0.5
    within = [n for n, e in plain.items() if e["cost"] <= most and n != name]
    return max(within, key=lambda n: float(errors[n].mean()))


if __name__ == "__main__":
    auto_cli(bench, as_positional=False)
