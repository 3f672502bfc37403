"""Measure what computed tokens add to a forecast, and write `benchmarks/results/tokens.json`.

    python benchmarks/tokens.py closed_loop
    python benchmarks/tokens.py open_loop

The bundled DiT (64 tokens), guidance 3, 50 steps, held-out samples. One torch thread, CPU time. A
step's cost is relative to the median anchor step of the same run; a run's cost is in full steps.
Plain forecasts with more anchors stand beside them: what the same time buys without tokens.
"""

import argparse
import itertools
import json
import platform
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from foreseer.checkpoints.format import load_predictor
from foreseer.evaluation.metrics import psnr
from foreseer.integration.forecasting import Run, forecasting
from foreseer.integration.host.hook import TrunkSkipper
from foreseer.integration.host.hosts import transformer_of
from foreseer.integration.host.taps import capturing
from foreseer.integration.host.trunk import TrunkTracer
from foreseer.integration.pipelines.load import load_pipeline
from foreseer.integration.schedule import warped
from foreseer.integration.token_runner import PartialTrunk, Pick
from foreseer.predictors.base import History, LinearPredictor, Predictor, Step
from foreseer.predictors.rules import Reuse, Taylor
from foreseer.predictors.tokens import ClusterPolicy, RandomPolicy, TokenPolicy
from foreseer.trajectories.prompts import class_items, generate_batch

RESULT = Path(__file__).parent / "results" / "tokens.json"
FIRST_ITEM = 5000  # the recording and the reference benchmark use lower ones
NUM_STEPS = 50
ANCHORS = {8: (0, 3, 8, 14, 20, 27, 34, 43), 6: (0, 5, 12, 20, 30, 40)}
MORE_ANCHORS = (10, 12, 14, 16, 20, 24, 32)
TOKENS: dict[str, tuple[TokenPolicy, LinearPredictor]] = {
    "ClusCa 16, gamma 0.005": (ClusterPolicy(16, 0.005), Reuse()),
    "ClusCa 16, gamma 0": (ClusterPolicy(16, 0.0), Reuse()),
    "ClusCa 16, gamma 0.5": (ClusterPolicy(16, 0.5), Reuse()),
    "ClusCa 16, gamma 0.005, attention taylor_1": (ClusterPolicy(16, 0.005), Taylor(1)),
    "ClusCa 16, gamma 0.5, attention taylor_1": (ClusterPolicy(16, 0.5), Taylor(1)),
    "ClusCa 32, gamma 0.005": (ClusterPolicy(32, 0.005), Reuse()),
    "all 64 tokens": (RandomPolicy(64, pattern=(True,)), Reuse()),
    "all 64 tokens, attention taylor_1": (RandomPolicy(64, pattern=(True,)), Taylor(1)),
    "DuCa 4": (RandomPolicy(4), Reuse()),
    "DuCa 16": (RandomPolicy(16), Reuse()),
    "DuCa 16, attention taylor_1": (RandomPolicy(16), Taylor(1)),
}


class Bench:
    """The pipeline, the held-out samples and their full run."""

    def __init__(self, num_samples: int, batch_size: int) -> None:
        self.pipe = load_pipeline("zoo:fashion_dit")
        items = class_items(num_samples, 10, FIRST_ITEM)
        self.batches = [items[i : i + batch_size] for i in range(0, num_samples, batch_size)]
        self.full, calls, _ = self.images()
        self.full_call = median(calls)

    def images(self) -> tuple[Tensor, list[float], float]:
        """Images in [0, 1], CPU seconds of every transformer call, and of everything."""
        calls: list[float] = []
        started: list[float] = []
        host = transformer_of(self.pipe)
        handles: list[Any] = [
            host.register_forward_pre_hook(lambda *_: started.append(time.process_time())),
            host.register_forward_hook(
                lambda *_: calls.append(time.process_time() - started.pop())
            ),
        ]
        settings: dict[str, Any] = {"guidance_scale": 3.0, "num_inference_steps": NUM_STEPS}
        begin = time.process_time()
        found = [
            generate_batch(self.pipe, batch, **settings, output_type="pt").images
            for batch in self.batches
        ]
        total = time.process_time() - begin
        for handle in handles:
            handle.remove()
        return torch.cat(found).float().clamp(0, 1), calls, total

    def row(self, name: dict[str, Any], attached: AbstractContextManager[Run]) -> dict[str, Any]:
        """One line of the table."""
        with attached as run:
            images, calls, total = self.images()
        report = run.report()
        seconds: dict[str, list[float]] = {"anchor": [], "partial": [], "forecast": []}
        partials = report.partials
        for place, value in enumerate(calls):
            step = place % NUM_STEPS
            kind = "anchor" if step in report.anchors else "forecast"
            seconds["partial" if step in partials else kind].append(value)
        proof = calls[0] - median(seconds["anchor"])  # tracing and proving, once per attach
        anchor = median(seconds["anchor"])
        error = psnr(images, self.full)
        line = {**name, "psnr_db": round(float(error.mean()), 2)}
        line["psnr_worst_db"] = round(float(error.min()), 2)
        for kind in ("partial", "forecast"):
            if seconds[kind]:
                line[f"{kind}_step_ratio"] = round(median(seconds[kind]) / anchor, 4)
        line["run_in_full_steps"] = round((total - proof) / anchor / len(self.batches), 1)
        line["state_kib_per_sample"] = round(report.state_bytes / 1024 / len(self.batches[0]), 1)
        print(" | ".join(map(str, line.values())), flush=True)
        return line


def rows_of(bench: Bench, num_anchors: int, predictor: Predictor, name: str) -> list[dict]:
    """All token methods on one predictor and budget, the plain forecast first."""
    anchors = None if predictor.learned else ANCHORS[num_anchors]
    key = {"num_anchors": num_anchors, "predictor": name}
    tap = None if predictor.learned else "hidden"
    plain = forecasting(bench.pipe, predictor, anchors, tap)
    rows = [bench.row({**key, "tokens": "none"}, plain)]
    for tokens, (policy, rule) in TOKENS.items():
        attached = forecasting(bench.pipe, predictor, anchors, tokens=policy, attention_rule=rule)
        rows.append(bench.row({**key, "tokens": tokens}, attached))
    return rows


def equal_cost(bench: Bench, counts: Sequence[int]) -> list[dict]:
    """Plain taylor_1 with more anchors."""
    return [
        bench.row(
            {"num_anchors": count, "predictor": "taylor_1", "tokens": "none"},
            forecasting(bench.pipe, Taylor(1), warped(count, NUM_STEPS), "hidden"),
        )
        for count in counts
    ]


class Recorded:
    """One full run: every call's arguments, the stream that entered the head, all attention."""

    def __init__(self, bench: Bench) -> None:
        self.host = transformer_of(bench.pipe)
        self.calls: list[tuple[tuple, dict]] = []
        handle: Any = self.host.register_forward_pre_hook(
            lambda _, args, kwargs: self.calls.append((args, kwargs)), with_kwargs=True
        )
        settings: dict[str, Any] = {"guidance_scale": 3.0, "num_inference_steps": NUM_STEPS}
        generate_batch(bench.pipe, bench.batches[0], **settings, output_type="latent")
        handle.remove()
        with TrunkTracer(self.host) as tracer:
            self.host(*self.calls[0][0], **self.calls[0][1])
        trunk = tracer.trunk()
        self.partial, self.skipper = PartialTrunk(self.host, trunk), TrunkSkipper(self.host, trunk)
        self.hidden: list[Tensor] = []
        self.attention: list[dict[str, Tensor]] = []
        for args, kwargs in self.calls:
            with self.partial.capturing() as kept, capturing(self.host, trunk, {"hidden"}) as found:
                self.host(*args, **kwargs)
            self.hidden.append(found["hidden"])
            self.attention.append(kept)

    def entering(self, step: int, feature: Tensor) -> Tensor:
        """The guided v when `feature` enters the head."""
        return guided(self.skipper(self.host.forward, *self.calls[step], lambda _: feature))

    def skipped(self, step: int, anchors: list[int], rule: LinearPredictor) -> Tensor:
        """The guided v of a pure forecast."""
        return self.entering(step, forecast(rule, step, anchors, [self.hidden[i] for i in anchors]))

    def computed(self, step: int, anchors: list[int], rule: LinearPredictor) -> Tensor:
        """The guided v of all tokens computed with forecast attention."""

        def given(block: str, pick: Pick) -> Tensor:
            features = [self.attention[i][block] for i in anchors]
            return pick(forecast(rule, step, anchors, features))

        selected = torch.arange(64).repeat(len(self.hidden[0]), 1)
        call = (self.host.forward, *self.calls[step])
        return guided(self.partial(*call, selected, given, lambda fresh: fresh))


def open_loop(bench: Bench) -> list[dict]:
    """Errors of forecasts on the states of a full run, per step and added up over the run.

    The guided v's error at each forecast step, relative to v, and the norm per sample of the
    errors' sum over all forecast steps / 50: what an Euler sampler accumulates to first order.
    """
    recorded = Recorded(bench)
    methods = {"forecast": recorded.skipped, "all tokens, attention": recorded.computed}
    rows = []
    for count, anchors in ANCHORS.items():
        for name, rule in itertools.product(methods, (Reuse(), Taylor(1))):
            steps: list[float] = []
            total = torch.zeros(())
            for step in (s for s in range(NUM_STEPS) if s not in anchors):
                before = [i for i in anchors if i < step][-2:]
                v = recorded.entering(step, recorded.hidden[step])
                error = methods[name](step, before, rule) - v
                steps.append(float(error.norm() / v.norm()))
                total = total + error / NUM_STEPS
            line = {"num_anchors": count, "method": f"{name} {type(rule).__name__.lower()}"}
            line["step_error"] = round(sum(steps) / len(steps), 4)
            line["error_of_sum"] = round(float(total.flatten(1).norm(dim=1).mean()), 3)
            print(line, flush=True)
            rows.append(line)
    return rows


def forecast(
    rule: LinearPredictor, step: int, anchors: list[int], features: list[Tensor]
) -> Tensor:
    """The rule's forecast from the features at the newest anchors it looks at."""
    window = rule.window or len(anchors)
    sigmas = [0.0] * len(anchors[-window:])  # neither rule reads them
    history = History(window, anchors[-window:], sigmas, features[-window:])
    found: Tensor = rule(history, Step(step, 0.0, NUM_STEPS))
    return found


def guided(output: Any) -> Tensor:
    """The prediction at guidance 3, from both branches."""
    cond, uncond = output[0].chunk(2)
    v: Tensor = uncond + 3 * (cond - uncond)
    return v


def measure_rows(bench: Bench) -> list[dict]:
    """The closed-loop table."""
    rows: list[dict] = []
    for num_anchors in ANCHORS:
        rows += rows_of(bench, num_anchors, Taylor(1), "taylor_1")
        learned = load_predictor(f"zoo:fashion_dit_l2p_{num_anchors}")
        rows += rows_of(bench, num_anchors, learned, "l2p")
    return rows + equal_cost(bench, MORE_ANCHORS)


def main() -> None:
    """Print the tables and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=["closed_loop", "open_loop"])
    parser.add_argument("--num-samples", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(options.num_samples, options.batch_size)
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    if options.stage == "open_loop":
        with torch.no_grad():
            result["open_loop"] = open_loop(bench)
    else:
        result |= {
            "pipeline": "zoo:fashion_dit",
            "num_tokens": 64,
            "guidance_scale": 3.0,
            "num_steps": NUM_STEPS,
            "num_samples": options.num_samples,
            "batch_size": options.batch_size,
            "first_item": FIRST_ITEM,
            "anchors": {str(count): list(anchors) for count, anchors in ANCHORS.items()},
            "full_call_ms": round(1e3 * bench.full_call, 1),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "rows": measure_rows(bench),
        }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
