"""Shallow steps against plain anchors at the same cost, on a U-Net and on a chain of blocks.

    python benchmarks/shallow.py --hosts '[fashion_unet, fashion_dit]'
    python benchmarks/shallow_page.py

Rows are fitted on trajectories that were recorded, on uniform lists, which nothing was chosen for.
`searched` is the list of three kinds that does best on a third set of pairs among the ten that
dynamic programming on Grams names; with `--num_random` as many lists drawn at random run on
them, too, for comparison. Judged are pairs that were never recorded. Costs are in full steps, a
shallow one by its share of FLOPs, convolutions included. Samples that were drawn are kept and not
drawn again.
"""

import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from torch import Tensor

from foreseer.checkpoints.format import load_predictor
from foreseer.evaluation.kinds_search import Kinds, three_kind_lists
from foreseer.evaluation.metrics import paired, psnr, summarise
from foreseer.evaluation.rows import adams_bashforth_rows
from foreseer.evaluation.search import beam_search
from foreseer.evaluation.timing import first_call, step_flops
from foreseer.integration.forecasting import forecasting
from foreseer.integration.host.hosts import transformer_of
from foreseer.integration.pipelines.load import load_pipeline
from foreseer.integration.schedule import Shallow, uniform
from foreseer.predictors.base import LinearPredictor
from foreseer.predictors.linear import L2P
from foreseer.predictors.rules import RULES
from foreseer.training.least_squares import fit_rows
from foreseer.training.recorded import spec_of
from foreseer.trajectories.gram import sum_grams
from foreseer.trajectories.prompts import Item, asked_items, generate_batch
from foreseer.trajectories.recorder import record
from foreseer.trajectories.recording import Recording

ROOT, RESULT = Path("runs/shallow"), Path("benchmarks/results/dato.json")
PIPELINES = {"fashion_unet": "examples/fashion_unet"}
PIPELINES |= {name: f"zoo:{name}" for name in ("fashion_dit", "emoji_flux")}
STEPS, FULL, JUDGED_FROM, CHOSEN_FROM, CHOSEN_ON = 50, 8, 100_000, 50_000, 16
CALL = {"guidance_scale": 3.0, "num_inference_steps": STEPS}
FORMULAS = ("reuse", "taylor_1")
PLAIN = {"reuse": "Euler", "taylor_1": "taylor_1"}
PROMPTS = {"calibration": "benchmarks/emoji_calibration.txt"}
PROMPTS |= {"held_out": "benchmarks/emoji_held_out.txt"}


def items(pipe: Any, first: int, count: int) -> list[Item]:
    """Classes or captions in turn, item i with seed i."""
    held_out = first >= JUDGED_FROM
    words = PROMPTS["held_out" if held_out else "calibration"]
    named = None if hasattr(pipe, "unet") or "DiT" in type(pipe).__name__ else words
    if named is not None and first == CHOSEN_FROM:  # captions that nothing was recorded of
        named = Path(words).read_text().split("\n")[-1 - count : -1]
    return asked_items(pipe, named, count, first)


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
        for name, shown in PLAIN.items():
            label = f"{shown}, {count} anchors"
            made[label] = dict(of=RULES[name], anchors=plain, tap="output", cost=count)
        ab2 = L2P(STEPS, plain, found.header.num_branches)
        ab2.set_rows(adams_bashforth_rows(plain, found.header.sigmas).expand_as(ab2.weight))
        ab2.spec = spec_of(found.header, "output", plain, 0)
        made[f"ab2, {count} anchors"] = dict(of=ab2, anchors=plain, tap="output", cost=count)
        rows = fit_rows(found, plain, "output")
        made[f"rows, {count} anchors"] = dict(of=rows, anchors=plain, tap="output", cost=count)
    for less in (1, 2):
        kept = uniform(FULL - less, STEPS)
        steps = spread(kept, int(less / share["deep.1"]))
        listed = Kinds(tuple(sorted({*kept, *steps})), tuple(steps))
        made[f"three kinds, {told(listed)}"] = three_kinds(found, listed, share)
    return made


def told(kinds: Kinds) -> str:
    """A list in words."""
    return f"{len(kinds.anchors) - len(kinds.shallow)} full and {len(kinds.shallow)} shallow"


def three_kinds(found: Recording, kinds: Kinds, share: dict[str, float]) -> dict[str, Any]:
    """Rows on the deep tap and on the output for a list of three kinds."""
    full = [step for step in kinds.anchors if step not in kinds.shallow]
    deep = Shallow(kinds.shallow, fit_rows(found, full, "deep.1"), "deep.1")
    rows, cost = fit_rows(found, kinds.anchors, "output"), kinds.cost(share["deep.1"])
    return dict(of=rows, anchors=kinds.anchors, tap="output", cost=cost, shallow=deep)


def searched(
    pipe: Any, found: Recording, share: dict[str, float], folder: Path, num_random: int
) -> dict[str, Any]:
    """The best of ten lists by dynamic programming, and of lists drawn at random beside it."""
    path = folder / f"search_{num_random}.json"
    if path.exists():
        known: dict[str, Any] = json.loads(path.read_text())
        return known
    chosen = [items(pipe, CHOSEN_FROM, CHOSEN_ON)]
    whole = kept(folder / f"full_chosen_{CHOSEN_ON}.pt", pipe, chosen, None)
    started = time.process_time()
    names = ("gram/deep.1", "gram/output")
    sums = sum_grams(found, list(names), found.items)
    deep, output = (sums[name].sum(0) for name in names)
    of = share["deep.1"]
    lists = three_kind_lists(deep, output, found.header.sigmas, of, FULL)
    seconds = time.process_time() - started
    source = random.Random(0)
    tried: dict[str, list[tuple[float, Kinds]]] = {"programming": [], "random": []}
    for name, each in (
        *(("programming", each) for each in lists),
        *(("random", drawn_list(source, of)) for _ in range(num_random)),
    ):
        path_of = folder / "lists" / f"{'_'.join(map(str, (*each.anchors, 's', *each.shallow)))}.pt"
        made = kept(path_of, pipe, chosen, three_kinds(found, each, share))
        tried[name].append((float(psnr(made, whole).mean()), each))
        print(f"{folder.name} {name} {told(each)}: {tried[name][-1][0]:.2f} dB", flush=True)
    best = {name: max(each) for name, each in tried.items() if each}
    result = {
        "lists": len(lists),
        "programming_seconds": seconds,
        "programming_db": best["programming"][0],
        "anchors": best["programming"][1].anchors,
        "shallow": best["programming"][1].shallow,
        "random_lists": num_random,
        "random_db": best["random"][0] if num_random else None,
    }
    path.write_text(json.dumps(result))
    return result


def searched_plain(
    pipe: Any, found: Recording, folder: Path, name: str, rule: LinearPredictor
) -> dict[str, Any]:
    """Anchors alone, searched with the same effort: ten lists by Grams, the best in closed loop."""
    chosen = [items(pipe, CHOSEN_FROM, CHOSEN_ON)]
    whole = kept(folder / f"full_chosen_{CHOSEN_ON}.pt", pipe, chosen, None)
    grams = torch.stack([found.load(i, ["gram/output"])["gram/output"] for i in found.items])
    tried = []
    for each in beam_search(grams, found.header.sigmas, FULL, rule)[:10]:
        learned = name == "rows"
        entry = dict(of=fit_rows(found, each) if learned else rule, anchors=each, tap="output")
        path = folder / "lists" / f"{name}_{'_'.join(map(str, each))}.pt"
        mean = float(psnr(kept(path, pipe, chosen, entry), whole).mean())
        tried.append((mean, each, entry))
        print(f"{folder.name} {name} {each}: {mean:.2f} dB", flush=True)
    _, anchors, entry = max(tried, key=lambda each: each[:2])
    return entry | {"anchors": anchors, "cost": FULL}


def drawn_list(source: random.Random, share: float) -> Kinds:
    """A list that uses up the cost of `FULL` steps, its steps anywhere."""
    full = source.randint(2, FULL - 1)
    shallow = min(int((FULL - full) / share), STEPS - full)
    steps = source.sample(range(1, STEPS), full - 1 + shallow)
    return Kinds((0, *sorted(steps)), tuple(sorted(steps[full - 1 :])))


def shares(pipe: Any) -> dict[str, float]:
    """FLOPs of a shallow step in those of a full one, by tap."""
    network = transformer_of(pipe)
    call = first_call(network, lambda: generate_batch(pipe, items(pipe, 0, 1), **CALL))
    cost = {tap: step_flops(network, call, tap) for tap in ("deep.1", "deep.2")}
    return {tap: each.base / each.full for tap, each in cost.items()}


def bench(
    hosts: Sequence[str] = tuple(PIPELINES),
    num_samples: int = 64,
    num_trajectories: int = 64,
    num_random: int = 0,
) -> None:
    """Record, fit, draw and compare, and write the rows as they come.

    Args:
        hosts: of `PIPELINES`.
        num_samples: judged samples.
        num_trajectories: recorded ones.
        num_random: lists drawn at random to compare the searched one with.
    """
    for host in hosts:
        pipe = load_pipeline(PIPELINES[host])
        pipe.set_progress_bar_config(disable=True)
        folder = ROOT / host
        taps = ("deep.1", "deep.2", "output")
        recorded = folder / f"recording_{num_trajectories}"
        record(pipe, items(pipe, 0, num_trajectories), recorded, taps=taps, states=False, **CALL)
        judged = items(pipe, JUDGED_FROM, num_samples)
        batches = [judged[i : i + 16] for i in range(0, num_samples, 16)]
        found, share = Recording(recorded), shares(pipe)
        whole = kept(folder / f"full_{num_samples}.pt", pipe, batches, None)
        errors: dict[str, Tensor] = {}
        made = entries(found, share)
        search = searched(pipe, found, share, folder, num_random)
        listed = Kinds(tuple(search["anchors"]), tuple(search["shallow"]))
        made[f"three kinds, searched, {told(listed)}"] = three_kinds(found, listed, share)
        for name in ("taylor_1", "rows"):
            own = searched_plain(pipe, found, folder, name, RULES["taylor_1"])
            made[f"{name}, searched, {FULL} anchors"] = own
        if host != "fashion_unet":
            readout = load_predictor(f"zoo:{host}_readout_{FULL}")
            at = readout.spec.anchors
            made[f"readout, {FULL} anchors"] = dict(of=readout, anchors=at, tap="output", cost=FULL)
        for name, each in made.items():
            path = folder / f"{name.replace(' ', '_')}_{num_samples}_{num_trajectories}.pt"
            errors[name] = psnr(kept(path, pipe, batches, each), whole)
            print(f"{host} {name}: {float(errors[name].mean()):.2f} dB", flush=True)
        write(host, made, errors, share, num_trajectories)
        found_file = json.loads(RESULT.read_text())
        searches = found_file.get("shallow_search", {}) | {host: search}
        RESULT.write_text(json.dumps(found_file | {"shallow_search": searches}, indent=1) + "\n")


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
    file = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    rows = [row for row in file.get("shallow", []) if row["host"] != host]
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
    RESULT.write_text(json.dumps(file | {"shallow": rows}, indent=1) + "\n")


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
