"""Whether caching pays in a masked language model, and write `benchmarks/results/dllm.json`.

    python benchmarks/dllm.py fit
    python benchmarks/dllm.py judge

The model of examples/masked_language_model on new running sums, greedy, one torch thread, CPU time.
Exact match and token agreement are against the right answer and the full decoding; cost is the CPU
time of a decoding relative to the full one. The corrector is fitted on decodings of other prompts.
"""

import argparse
import contextlib
import functools
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

EXAMPLE = Path(__file__).parents[1] / "examples" / "masked_language_model"
sys.path.insert(0, str(EXAMPLE))

from digit_tasks import NUM_DIGITS, VOCABULARY, Examples, running_sums  # noqa: E402
from masked_model import MaskedLanguageModel, load_model  # noqa: E402

import foreseer as fs  # noqa: E402
from foreseer.evaluation.metrics import paired  # noqa: E402
from foreseer.integration.host.module_host import ModuleHost  # noqa: E402
from foreseer.integration.masked_cache import dllm_cache, prompt_drift  # noqa: E402
from foreseer.integration.masked_sampler import Sampled, sample_masked  # noqa: E402
from foreseer.predictors.base import Predictor  # noqa: E402
from foreseer.predictors.rules import Reuse, Taylor  # noqa: E402
from foreseer.training.disca.masked_fit import fit_corrector, record_decodings  # noqa: E402

RESULT = Path(__file__).parent / "results" / "dllm.json"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "dllm.png"
FIT_SEED, CHOOSE_SEED, JUDGE_SEED = 10**6, 2 * 10**6, 3 * 10**6  # training draws from 0, 1, ...
HORIZON = 5  # two evaluations are six steps apart
BATCH, LEARNING_RATE = 64, 3e-3
EVALUATIONS = (6, 4, 3, 2)
THRESHOLDS = (0.9, 0.7, 0.5, 0.4, 0.3, 0.2, 0.15)
CACHES = ((1, 1, 0.0), (1, 4, 0.25), (1, 12, 0.25), (12, 1, 0.0), (4, 4, 0.25))
Decode = Callable[[Tensor], Sampled]


def host_of(model: MaskedLanguageModel) -> ModuleHost:
    """The model as a host."""
    return fs.host(model, blocks="model.transformer.blocks", head="model.transformer.ln_f")


def fit(out: Path, num_decodings: int = 768, num_steps: int = 1500) -> None:
    """Record decodings, train the corrector, and write its weights and what it took."""
    model = load_model()
    began = time.process_time()
    examples = running_sums(num_decodings, torch.Generator().manual_seed(FIT_SEED))
    decodings = record_decodings(host_of(model), examples.prompts, NUM_DIGITS)
    recorded = time.process_time() - began
    losses: list[float] = []

    def tell(number: int, loss: float) -> None:
        losses.append(loss)
        if number % 100 == 99:
            mean = sum(losses[-100:]) / 100
            print(f"{number + 1:6d}  {time.process_time() - began:5.0f} s  {mean:.4f}", flush=True)

    predictor = fit_corrector(
        host_of(model), decodings, HORIZON, num_steps, BATCH, LEARNING_RATE, tell=tell
    )
    fs.save(predictor, str(out / "corrector"))
    took = {"record_seconds": recorded, "fit_seconds": time.process_time() - began - recorded}
    facts = {"decodings": num_decodings, "fit_steps": num_steps, **took}
    (out / "fit.json").write_text(json.dumps(facts))


def forecast(
    model: MaskedLanguageModel, predictor: Predictor, tap: str, evaluations: int, prompts: Tensor
) -> Sampled:
    """Decode one token a step with `evaluations` evaluations, and forecasts in between."""
    every = NUM_DIGITS // evaluations
    host, anchors = host_of(model), range(0, NUM_DIGITS, every)
    with fs.forecasting(host, predictor, anchors, tap) as run, run.steps(NUM_DIGITS) as steps:
        return sample_masked(model, prompts, NUM_DIGITS, NUM_DIGITS, clock=steps)


@contextlib.contextmanager
def cached(
    model: MaskedLanguageModel, settings: tuple[int, int, float], probe: Tensor
) -> Iterator[Any]:
    """dLLM-Cache, whatever the prompt does."""
    with dllm_cache(model, NUM_DIGITS, *settings, probe, float("inf")) as run:
        yield run


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share."""
    z = 1.96
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / 4 / count**2)
    return max(middle - half, 0.0), middle + half


class Bench:
    """The model, the judged prompts and their full decoding."""

    def __init__(self, examples: Examples, batch_size: int) -> None:
        self.model = load_model()
        self.examples = examples
        self.batches = examples.prompts.split(batch_size)
        self.full, self.full_seconds, _ = self.decoded(self.plain(NUM_DIGITS))
        self.right: dict[str, Tensor] = {}

    def plain(self, steps: int, **settings: Any) -> Decode:
        """The sampler alone."""
        return functools.partial(_plain, self.model, steps, settings)

    def decoded(self, decode: Decode) -> tuple[Tensor, float, float]:
        """Responses, CPU seconds and mean evaluations of the sampler's steps."""
        began = time.process_time()
        found = [decode(batch) for batch in self.batches]
        seconds = time.process_time() - began
        steps = torch.cat([each.evaluations for each in found]).double().mean()
        return torch.cat([each.responses for each in found]), seconds, float(steps)

    def row(
        self, method: str, kind: str, decode: Decode, evaluations: float | None = None, **more: Any
    ) -> dict[str, Any]:
        """One line of the table."""
        responses, seconds, steps = self.decoded(decode)
        right = (responses == self.examples.responses).all(1).double()
        evaluations = round(steps, 2) if evaluations is None else evaluations
        name = f"{method} {evaluations:g}"
        self.right[name] = right
        low, high = wilson(float(right.mean()), len(right))
        line = {
            "method": method,
            "kind": kind,
            "evaluations": evaluations,
            "exact_match": round(float(right.mean()), 4),
            "wilson_low": round(low, 4),
            "wilson_high": round(high, 4),
            "token_agreement": round(float((responses == self.full).double().mean()), 4),
            "tokens_per_second": round(responses.numel() / seconds, 1),
            "cost_ratio": round(seconds / self.full_seconds, 3),
            "num_samples": len(right),
            **more,
        }
        print(" | ".join(map(str, line.values())), flush=True)
        return line

    def against(self, line: dict[str, Any], rivals: list[dict[str, Any]]) -> None:
        """Add to a line how far it is ahead of each rival, paired."""
        mine = self.right[f"{line['method']} {line['evaluations']:g}"]
        for rival in rivals:
            theirs = self.right[f"{rival['method']} {rival['evaluations']:g}"]
            found = paired(mine, theirs)
            line[f"ahead_of_{rival['kind']}"] = {
                "rival": f"{rival['method']}, {rival['evaluations']:g}",
                "mean": round(found.mean, 4),
                "paired_low": round(found.low, 4),
                "paired_high": round(found.high, 4),
            }


def _plain(
    model: MaskedLanguageModel, steps: int, settings: dict[str, Any], prompts: Tensor
) -> Sampled:
    return sample_masked(model, prompts, NUM_DIGITS, steps, **settings)


FORECASTS = (
    ("taylor_1", "formula", Taylor(1), "hidden"),
    ("last block", "formula", Reuse(), "before_last"),
)


def judge(out: Path, num_samples: int = 256, batch_size: int = 64, result: Path = RESULT) -> None:
    """Measure every method and write the rows and the picture."""
    corrector = fs.load(str(out / "corrector"))
    bench = Bench(running_sums(num_samples, torch.Generator().manual_seed(JUDGE_SEED)), batch_size)
    rows, model = [*judged(bench, corrector), *cached_rows(bench)], bench.model
    probe = bench.batches[0][:8]
    facts = {
        "model_parameters": sum(p.numel() for p in model.parameters()),
        "layers": model.config.num_layers,
        "width": model.config.width,
        "corrector_parameters": sum(p.numel() for p in corrector.parameters()),
        **forecast_cost(model, corrector, bench.batches[0]),
        "prompt_drift": {
            str(k): round(prompt_drift(model, probe, NUM_DIGITS, k), 3) for k in (2, 4, 12)
        },
        "machine": platform.machine(),
        "torch": torch.__version__,
        **json.loads((out / "fit.json").read_text()),
    }
    result.write_text(json.dumps({"facts": facts, "rows": rows}, indent=1) + "\n")
    draw(bench, corrector, 4)


def judged(bench: Bench, corrector: Predictor) -> list[dict[str, Any]]:
    """All rows but dLLM-Cache's."""
    rows = [bench.row("full", "full", bench.plain(NUM_DIGITS))]
    for evaluations in EVALUATIONS:
        rows.append(bench.row("parallel", "parallel", bench.plain(evaluations)))
    for threshold in THRESHOLDS:
        decode = bench.plain(NUM_DIGITS, commit="threshold", threshold=threshold)
        rows.append(bench.row(f"threshold {threshold}", "threshold", decode))
    for name, kind, each, tap in (*FORECASTS, ("corrector", "learned", corrector, "before_last")):
        for evaluations in EVALUATIONS:
            decode = functools.partial(forecast, bench.model, each, tap, evaluations)
            line = bench.row(name, kind, decode, evaluations)
            if kind == "learned":
                bench.against(line, rivals_of(rows, evaluations))
            rows.append(line)
    return rows


def cached_rows(bench: Bench) -> list[dict[str, Any]]:
    """The rows of dLLM-Cache."""
    rows, probe = [], bench.batches[0][:8]
    for prompt, response, ratio in CACHES:
        with cached(bench.model, (prompt, response, ratio), probe) as run:
            name = f"dLLM-Cache Kp {prompt} Kr {response} rho {ratio:g}"
            line = bench.row(name, "cache", bench.plain(NUM_DIGITS))
            line["computed_share"] = round(run.share, 3)
        rows.append(line)
    return rows


@torch.no_grad()
def forecast_cost(
    model: MaskedLanguageModel, predictor: Predictor, prompts: Tensor
) -> dict[str, float]:
    """A forecast relative to an evaluation, in floating-point operations and in CPU time.

    The two take turns; the time is the median of the ratios.
    """
    from torch.utils.flop_counter import FlopCounterMode

    masks = prompts.new_full((len(prompts), NUM_DIGITS), model.config.mask_token_id)
    ids = torch.cat([prompts, masks], 1)
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    seconds, flops = [], []
    anchors = range(0, NUM_DIGITS, 2)
    with fs.forecasting(host_of(model), predictor, anchors, "before_last") as run:
        for _ in range(4):  # the first finds out about the model
            with run.steps(NUM_DIGITS) as steps:
                for _ in steps:
                    began = time.process_time()
                    model(**call)
                    seconds.append(time.process_time() - began)
        with run.steps(NUM_DIGITS) as steps:
            for _ in steps:
                with FlopCounterMode(display=False) as counter:
                    model(**call)
                flops.append(counter.get_total_flops())
    ratios = [seconds[i + 1] / seconds[i] for i in range(NUM_DIGITS, len(seconds), 2)]
    return {
        "forecast_flops": round(flops[1] / flops[0], 4),
        "forecast_seconds": round(statistics.median(ratios), 4),
    }


def rivals_of(rows: list[dict[str, Any]], evaluations: int) -> list[dict[str, Any]]:
    """Parallel decoding, and the threshold with the fewest evaluations that are not fewer.

    Where all have fewer, the one with the most.
    """
    parallel = [r for r in rows if r["kind"] == "parallel" and r["evaluations"] == evaluations]
    sure = [r for r in rows if r["kind"] == "threshold" and r["evaluations"] >= evaluations]
    if not sure:
        every = [r for r in rows if r["kind"] == "threshold"]
        return [*parallel, max(every, key=lambda row: float(row["evaluations"]))]
    return [*parallel, min(sure, key=lambda row: float(row["evaluations"]))]


def filling(found: Sampled, answer: Tensor, every: int) -> list[list[tuple[str, str]]]:
    """One response after each evaluation of the network: a sign and its state for every token.

    Args:
        found: a decoding; its first sequence is shown.
        answer: the right response.
        every: steps of an evaluation.

    Returns:
        A list for every evaluation; a state is `masked`, `new` (committed since the one before),
        `right` or `wrong`.
    """
    signs = [VOCABULARY[token] for token in found.responses[0].tolist()]
    is_right = (found.responses[0] == answer).tolist()
    at = (found.committed_at[0] // every).tolist()
    frames = []
    for evaluation in range(max(at) + 1):
        frame = []
        for sign, right, when in zip(signs, is_right, at, strict=True):
            state = "masked" if when > evaluation else "right" if right else "wrong"
            state = "new" if state == "right" and when == evaluation else state
            frame.append(("" if state == "masked" else sign, state))
        frames.append(frame)
    return frames


COLOURS = {"masked": "#d9dbe3", "new": "#8fc7a5", "right": "#dcefe3", "wrong": "#f2a49b"}


def draw(bench: Bench, predictor: Predictor, evaluations: int) -> None:
    """Write the picture: the first judged prompt that parallel decoding gets wrong."""
    from matplotlib.figure import Figure

    every = NUM_DIGITS // evaluations
    wrong = (bench.right[f"parallel {evaluations}"] == 0).nonzero()
    number = int(wrong[0]) if len(wrong) else 0
    prompt, answer = bench.examples.prompts[[number]], bench.examples.responses[number]
    shown = {
        "parallel decoding": filling(bench.plain(evaluations)(prompt), answer, 1),
        "corrector": filling(
            forecast(bench.model, predictor, "before_last", evaluations, prompt), answer, every
        ),
    }
    figure = Figure(figsize=(7.2, 2.6), dpi=160)
    panels = figure.subplots(1, 2)
    for panel, (name, frames) in zip(panels, shown.items(), strict=True):
        digits = [VOCABULARY[t] for t in prompt[0, 1:-1].tolist()]
        for row, frame in enumerate([[(d, "prompt") for d in digits], *frames]):
            for column, (sign, state) in enumerate(frame):
                if state != "prompt":
                    colour = COLOURS[state]
                    box = {"facecolor": colour, "edgecolor": "white", "transform": panel.transData}
                    panel.add_patch(_square(column, row, box))
                panel.text(column, row, sign, ha="center", va="center", fontsize=9)
        panel.set_xlim(-0.6, len(digits) - 0.4)
        panel.set_ylim(len(frames) + 0.6, -0.6)
        panel.set_yticks(range(len(frames) + 1), ["prompt", *range(1, len(frames) + 1)], fontsize=8)
        panel.set_xticks([])
        panel.set_title(f"{name}, {evaluations} evaluations", fontsize=9)
        panel.spines[:].set_visible(False)
        panel.tick_params(length=0)
    figure.tight_layout()
    figure.savefig(PICTURE)


def _square(column: int, row: int, style: dict[str, Any]) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((column - 0.5, row - 0.5), 1, 1, **style)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("fit", "judge"))
    parser.add_argument("--out", type=Path, default=Path("runs/dllm"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    (fit if arguments.what == "fit" else judge)(arguments.out)


if __name__ == "__main__":
    main()
