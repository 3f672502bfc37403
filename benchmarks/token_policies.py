"""Lattices of computed tokens (JiT) and pruned self-attention (DaTo) on both bundled models.

    python benchmarks/token_policies.py lattice
    python benchmarks/token_policies.py pruning
    python benchmarks/token_policies.py seconds

The first two take `--hosts '[fashion_dit]'` and resume. They write `benchmarks/results/jit.json`
and the rows under `tokens` of `benchmarks/results/dato.json`. Rows are fitted on the recording that
`benchmarks/readout.py record` makes, past and gain on the first prompts of the same, and chosen on
the next. Judged on the 64 held-out samples of benchmarks/readout.py, with plain anchors at the same
cost beside. Cost is CPU time on one thread.
"""

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel
from jsonargparse import auto_cli
from torch import Tensor, nn

from foreseer.checkpoints.format import load_predictor, save_predictor
from foreseer.evaluation.benchmark import FIRST_ITEM
from foreseer.evaluation.metrics import paired, psnr
from foreseer.evaluation.plan import Entry
from foreseer.evaluation.runs import run_entry
from foreseer.integration.forecasting import Run, forecasting
from foreseer.integration.pipelines.load import load_pipeline
from foreseer.integration.pruning_runner import AttendedBy, AttentionCall
from foreseer.integration.schedule import uniform, warped
from foreseer.integration.token_runner import SELF_ATTENTION
from foreseer.predictors.lattice_policy import LatticePolicy
from foreseer.predictors.linear import L2P
from foreseer.predictors.pruning_policy import PruningPolicy
from foreseer.predictors.rules import Reuse, Taylor
from foreseer.predictors.token_rows import TokenRows
from foreseer.training.least_squares import fit_rows
from foreseer.training.token_fit import fit_tokens
from foreseer.trajectories.prompts import asked_items, generate_batch
from foreseer.trajectories.recording import Recording

STEPS = 50
CALL: dict[str, Any] = {"guidance_scale": 3.0, "num_inference_steps": STEPS}
BATCH = 16


SHARED = Path("benchmarks/results/dato.json")  # with the rows of benchmarks that prune steps
JIT = Path("benchmarks/results/jit.json")
KEPT = Path("runs/token_policies")
FITTED_ON = 16  # for past and gain, and as many more to choose on
ROWS_FITTED_ON = 64
ANCHORS = (0, 3, 8, 14, 20, 27, 34, 43)
HOSTS: dict[str, tuple[str | None, str | None]] = {
    "fashion_dit": (None, None),
    "emoji_flux": ("benchmarks/emoji_calibration.txt", "benchmarks/emoji_held_out.txt"),
}
"""Prompts of the fits and of the judged samples; None goes round the classes."""
PLAIN = {"readout": (8, 11), "taylor_1": (18,), "ab2": (18,)}
AT_PRICE = {"ab2": (38,)}
"""What 50 steps of which 40 % is pruned cost where a picture has 4,096 tokens, see `seconds`."""


class Bench:
    """A bundled model, its judged samples, and what has been measured on them so far.

    Args:
        host: its name.
        num_samples: judged samples.
    """

    def __init__(self, host: str, num_samples: int) -> None:
        self.host, self.num_samples = host, num_samples
        self.pipe = load_pipeline(f"zoo:{host}")
        self.items = asked_items(self.pipe, HOSTS[host][1], num_samples, FIRST_ITEM)
        calibration = asked_items(self.pipe, HOSTS[host][0], 2 * FITTED_ON, 0)
        self.fitted_on, self.chosen_on = calibration[:FITTED_ON], calibration[FITTED_ON:]
        self.full = self.measured("full", None)

    def measured(
        self, name: str, attach: Callable[[], AbstractContextManager[Run]] | None, **changes: Any
    ) -> dict[str, Any]:
        """The pictures under what `attach` attaches, their error and the cost in full steps."""
        path = KEPT / self.host / f"{name} of {self.num_samples}.pt".replace(" ", "_")
        if path.exists():
            found: dict[str, Any] = torch.load(path, weights_only=True)
            return found
        context = contextlib.nullcontext() if attach is None else attach()
        with context as run:
            pictures, calls = self.drawn(**changes)
        anchors = range(STEPS) if run is None else run.report().anchors
        partials = [] if run is None else run.report().partials
        full = pictures if name == "full" else self.full["pictures"]
        found = {"pictures": pictures, "error": psnr(pictures, full), "calls": calls}
        found |= {"anchors": list(anchors), "partials": list(partials)}
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(found, path)
        print(f"{self.host} {name}: {float(found['error'].mean()):.2f} dB", flush=True)
        return found

    def drawn(self, **changes: Any) -> tuple[Tensor, list[float]]:
        """All pictures, and CPU seconds of every call of the transformer."""
        started, calls = [0.0], []
        host = self.pipe.transformer
        handles: list[Any] = [
            host.register_forward_pre_hook(
                lambda *_: started.__setitem__(0, time.process_time()), prepend=True
            ),
            host.register_forward_hook(lambda *_: calls.append(time.process_time() - started[0])),
        ]
        pictures = []
        try:
            for start in range(0, self.num_samples, BATCH):
                batch = self.items[start : start + BATCH]
                images = generate_batch(self.pipe, batch, output_type="pt", **{**CALL, **changes})
                pictures.append(images.images.float().clamp(0, 1))
        finally:
            for handle in handles:
                handle.remove()
        return torch.cat(pictures), calls

    def plain(self, method: str, evaluations: int) -> dict[str, Any]:
        """What stands beside: a shipped readout, a formula on a warped list, or a solver."""
        make = warped if evaluations < STEPS // 2 else uniform  # dense lists leave no room to warp
        anchors = make(evaluations, STEPS)
        name = f"{method} {evaluations}"
        if method == "readout":
            name = f"zoo:{self.host}_readout_{evaluations}"
            return self.measured(name.replace(":", "_"), lambda: forecasting(self.pipe, name))
        if method == "taylor_1":
            rule = Taylor(1)
            return self.measured(name, lambda: forecasting(self.pipe, rule, anchors, "hidden"))
        path = KEPT / self.host / f"{name} of {self.num_samples}.pt".replace(" ", "_")
        if not path.exists():
            entry = Entry(method, "solver", "none", "given", anchors)
            sigmas = self.sigmas()
            batches = [self.items[i : i + BATCH] for i in range(0, self.num_samples, BATCH)]
            made = run_entry(self.pipe, entry, sigmas, batches, lambda done: None, **CALL)
            found = {"error": psnr(made.images, self.full["pictures"]), "anchors": list(anchors)}
            torch.save(found, path)
            print(f"{self.host} {name}: {float(found['error'].mean()):.2f} dB", flush=True)
        solved: dict[str, Any] = torch.load(path, weights_only=True)
        return solved

    def sigmas(self) -> list[float]:
        """Flow times of a full run."""
        predictor = load_predictor(f"zoo:{self.host}_readout_8")
        return list(predictor.spec.sigmas)

    def costs(self, found: dict[str, Any]) -> tuple[float, float | None]:
        """Cost of a run in full steps, and of a partial step (or pruned anchor) in full ones."""
        whole = median(self.full["calls"])
        calls = found.get("calls")
        if calls is None:
            return float(len(found["anchors"])), None
        first = STEPS if len(calls) > STEPS else 0  # the first batch proves, too
        steps = [call / whole for call in calls[first:]]
        total = sum(steps) / (len(steps) / STEPS)
        special = found["partials"] or found["anchors"][1:]
        each = [value for place, value in enumerate(steps) if place % STEPS in special]
        return total, median(each)

    def row(
        self, name: str, found: dict[str, Any], rival: tuple[str, dict], base: tuple[str, dict]
    ) -> dict[str, Any]:
        """A line of the table, compared with a rival and with what the policy starts from."""
        error = found["error"].double()
        total, each = self.costs(found)
        gap = paired(error, rival[1]["error"].double())
        over = paired(error, base[1]["error"].double())
        return {
            "host": self.host,
            "method": name,
            "psnr_db": float(error.mean()),
            "psnr_q10": float(error.quantile(0.1)),
            "rival": rival[0],
            "paired_db": gap.mean,
            "paired_low_db": gap.low,
            "paired_high_db": gap.high,
            "wins": gap.wins,
            "base": base[0],
            "over_base_db": over.mean,
            "over_base_low_db": over.low,
            "over_base_high_db": over.high,
            "num_samples": self.num_samples,
            "evaluations": len(found["anchors"]),
            "partial_steps": len(found.get("partials", [])),
            "step_cost": each,
            "cost_in_full_steps": total,
            "anchors": " ".join(map(str, found["anchors"])),
        }


def rows_of(host: str) -> L2P:
    """Rows of the hidden tap on the anchors of all hosts, by least squares on Grams."""
    recorded = Recording(f"runs/readout/{host}/recording")
    return fit_rows(recorded, ANCHORS, "hidden", items=recorded.items[:ROWS_FITTED_ON])


def fitted(bench: Bench, name: str, rows: L2P, policy: Any, rule: Any) -> TokenRows:
    """A policy's past and gain, from its file where it was fitted before."""
    folder = KEPT / bench.host / name.replace(" ", "_")
    if not (folder / "config.json").exists():
        began = time.process_time()
        made = fit_tokens(bench.pipe, rows, policy, bench.fitted_on, rule, bench.chosen_on, **CALL)
        metrics = made.spec.metrics | {"fit_seconds": time.process_time() - began}
        save_predictor(made, replace(made.spec, metrics=metrics), folder)
    found: Any = load_predictor(folder)
    return found


def best(found: dict[str, dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    """The plain run with the least error."""
    return max(found.items(), key=lambda each: float(each[1]["error"].mean()))


def lattice(
    hosts: Sequence[str] = tuple(HOSTS),
    shares: Sequence[float] = (0.25, 0.5),
    num_samples: int = 64,
) -> None:
    """Compute a lattice at every forecast step between eight anchors.

    Args:
        hosts: bundled models.
        shares: of the tokens.
        num_samples: judged samples.
    """
    torch.set_num_threads(1)
    rule = Taylor(1)
    for host in hosts:
        bench = Bench(host, num_samples)
        rows = rows_of(host)
        runs = {"rows alone": bench.measured("rows", partial(forecasting, bench.pipe, rows))}
        for share in shares:
            policies = {
                f"{share:.0%} interpolated (JiT)": LatticePolicy(share, past=0.0),
                f"{share:.0%}, no change for the others": LatticePolicy(share, gain=0.0),
                f"{share:.0%}, whole change": LatticePolicy(share),
            }
            for name, policy in policies.items():
                given = {"tokens": policy, "attention_rule": rule}
                runs[name] = bench.measured(
                    name.replace(",", ""), partial(forecasting, bench.pipe, rows, **given)
                )
            learned = fitted(bench, f"lattice {share}", rows, LatticePolicy(share), rule)
            runs[f"{share:.0%}, learned"] = bench.measured(
                f"lattice {share}", partial(forecasting, bench.pipe, learned, attention_rule=rule)
            )
        plain = {
            f"{method} at {count}": bench.plain(method, count)
            for method, counts in PLAIN.items()
            for count in counts
        }
        rival = best(plain)
        base = next(iter(runs.items()))
        lines = [bench.row(name, found, rival, base) for name, found in (runs | plain).items()]
        put(JIT, host, lines)


def pruning(
    hosts: Sequence[str] = tuple(HOSTS),
    ratios: Sequence[float] = (0.4,),
    num_samples: int = 64,
) -> None:
    """Prune self-attention at all 50 steps.

    Args:
        hosts: bundled models.
        ratios: shares of the tokens.
        num_samples: judged samples.
    """
    torch.set_num_threads(1)
    for host in hosts:
        bench = Bench(host, num_samples)
        spec = load_predictor(f"zoo:{host}_readout_8").spec
        rows = L2P(STEPS, range(STEPS), 2)
        rows.spec = replace(spec, tap="hidden", anchors=tuple(range(STEPS)), metrics={})
        runs = {}
        for ratio in ratios:
            policies = {
                f"{ratio:.0%} copied (DaTo)": PruningPolicy(ratio),
                f"{ratio:.0%}, own past reused": PruningPolicy(ratio, past=1.0, gain=0.0),
            }
            for name, policy in policies.items():
                attach = partial(forecasting, bench.pipe, Reuse(), range(STEPS), tokens=policy)
                runs[name] = bench.measured(name.replace(",", ""), attach)
            learned = fitted(bench, f"pruning {ratio}", rows, PruningPolicy(ratio), None)
            runs[f"{ratio:.0%}, learned"] = bench.measured(
                f"pruning {ratio}", partial(forecasting, bench.pipe, learned)
            )
        plain = {
            f"{method} at {count}": bench.plain(method, count)
            for method, counts in (AT_PRICE | {"readout": (8, 11)}).items()
            for count in counts
        }
        rival = best(plain)
        base = next(iter(runs.items()))
        lines = [bench.row(name, found, rival, base) for name, found in (runs | plain).items()]
        put(SHARED, host, lines, "quality")


def put(path: Path, host: str, lines: Sequence[dict[str, Any]], kind: str = "") -> None:
    """Exchange a host's rows of a file, those of a kind where the file holds several."""
    told: Any = json.loads(path.read_text()) if path.exists() else []
    lines = [({"kind": kind} if kind else {}) | line for line in lines]
    if kind:
        told = told or {}
        others = [
            row for row in told.get("tokens", []) if (row["kind"], row["host"]) != (kind, host)
        ]
        told["tokens"] = others + lines
    else:
        told = [row for row in told if row["host"] != host] + lines
    path.write_text(json.dumps(told, indent=1) + "\n")
    for line in lines:
        print({name: line[name] for name in list(line)[1:7]}, flush=True)


@torch.no_grad()
def seconds(
    sides: Sequence[int] = (32, 64),
    widths: Sequence[int] = (192, 512),
    ratios: Sequence[float] = (0.2, 0.4, 0.5, 0.7),
    num_rounds: int = 5,
) -> None:
    """Time one block with pruned attention against the whole one, in turns, on random weights.

    Args:
        sides: of the square of tokens.
        widths: channels of the block, in heads of 64.
        ratios: shares pruned.
        num_rounds: the median of so many is taken.
    """
    torch.set_num_threads(1)
    rows = []
    for width, side, kind in itertools.product(widths, sides, ("dit", "flux")):
        block, call = random_block(kind, width, side * side)
        site = SELF_ATTENTION[type(block).__name__]
        attention = block.get_submodule(site[0])
        for ratio in ratios:
            policy = PruningPolicy(ratio)
            policy.lay_out((1, side, side))
            policy.observe(torch.zeros(1, side * side, 1))
            kept: dict[str, Any] = {}

            def pruned(asked: AttentionCall, policy=policy, kept=kept) -> Any:
                choice = kept.get("choice") or policy.choose(asked.stream, 1)
                kept["last"] = choice
                text, fresh = asked(choice.kept)
                return text, policy.recover(None, fresh, choice, (0,), 1)

            stub = AttendedBy("block", attention, site[1], pruned, [torch.empty(1, side * side)])
            measured: dict[str, list[float]] = {"whole": [], "own choice": [], "given choice": []}
            for _ in range(num_rounds):
                for name, spent in measured.items():
                    block._modules[site[0]] = attention if name == "whole" else stub
                    kept["choice"] = kept.get("last") if name == "given choice" else None
                    began = time.process_time()
                    call()
                    spent.append(time.process_time() - began)
            block._modules[site[0]] = attention
            whole = median(measured["whole"])
            row = {"kind": "seconds", "host": f"random {kind} block", "width": width}
            row |= {"tokens": side * side, "ratio": ratio, "whole_ms": round(1e3 * whole, 2)}
            row |= {
                f"{name.split()[0]}_choice": round(median(measured[name]) / whole, 3)
                for name in ("own choice", "given choice")
            }
            rows.append(row)
            print(row, flush=True)
    told = json.loads(SHARED.read_text()) if SHARED.exists() else {}
    others = [row for row in told.get("tokens", []) if row["kind"] != "seconds"]
    told["tokens"] = others + rows
    SHARED.write_text(json.dumps(told, indent=1) + "\n")


def random_block(kind: str, width: int, num_tokens: int) -> tuple[nn.Module, Callable[[], Any]]:
    """A block of a kind with random weights, and a call of it on so many tokens and one row."""
    torch.manual_seed(0)
    hidden = torch.randn(1, num_tokens, width)
    if kind == "dit":
        host: Any = DiTTransformer2DModel(width // 64, 64, 4, num_layers=1, norm_num_groups=1)
        block = host.transformer_blocks[0].eval()
        labels = torch.zeros(1, dtype=torch.long)
        return block, lambda: block(hidden, timestep=labels, class_labels=labels)
    host = FluxTransformer2DModel(
        in_channels=4,
        num_layers=0,
        num_single_layers=1,
        attention_head_dim=64,
        num_attention_heads=width // 64,
        joint_attention_dim=width,
        pooled_projection_dim=width,
        axes_dims_rope=(16, 24, 24),
    )
    block = host.single_transformer_blocks[0].eval()
    text, temb = torch.randn(1, 16, width), torch.randn(1, width)
    side = int(num_tokens**0.5)
    ids = torch.zeros(16 + num_tokens, 3)
    places = torch.arange(num_tokens)
    ids[16:, 1], ids[16:, 2] = places // side, places % side
    rotary = host.pos_embed(ids)
    return block, lambda: block(hidden, text, temb, image_rotary_emb=rotary)


if __name__ == "__main__":
    auto_cli([lattice, pruning, seconds])
