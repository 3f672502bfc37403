"""Measure what a skipped step costs next to a full step, here and elsewhere.

    pip install foreseer[parity]
    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python benchmarks/overhead.py

The host `flux_70m` is a FLUX transformer of width 512 (8 heads of 64) with 4 double-stream and 8
single-stream blocks, 71.1 M random parameters in float32, run by `FluxPipeline` on 256 image and 64
text tokens. Measured are foreseer's rules, the caches of diffusers and cache-dit's DBCache, each on
its own copy of the host with shared weights, one after another in every round and in rotating
order, in one process on one torch thread.

A step lasts from the call of the transformer to the end of the scheduler's `step`, where foreseer
does its bookkeeping. Its cost is CPU time. A round's number is the median over the steps counted in
one run, which come after the last anchor; the result is the median over the rounds. The first run
of each system is not counted. In every run the forwards of blocks and attentions are counted, and
an error is raised unless each step ran exactly what its system runs at such a step.

`state_bytes` is the most a system holds at the end of a step: foreseer's report, elsewhere the
distinct storages behind the tensors in the state objects.

Writes `benchmarks/results/overhead.json`; about 15 minutes.
"""

import argparse
import functools
import json
import os
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "ERROR")

import torch
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from overhead_host import flux_70m, pipeline, run
from overhead_systems import Ran, System, systems
from torch import nn
from tqdm.auto import tqdm

from foreseer.evaluation.timing import threads

RESULT = Path(__file__).parent / "results" / "overhead.json"
HOST = "flux_70m"


@dataclass
class Counts:
    """Forwards of blocks and of their attentions since the last `take`."""

    blocks: int = 0
    attentions: int = 0

    def take(self) -> Ran:
        """The counts, set back to zero."""
        found = (self.blocks, self.attentions)
        self.blocks = self.attentions = 0
        return found


def count_forwards() -> Counts:
    """Let the classes of FLUX's blocks and attentions count what really runs, below every hook."""
    counts = Counts()

    def watch(kind: type[nn.Module], name: str) -> None:
        own = kind.forward

        @functools.wraps(own)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            setattr(counts, name, getattr(counts, name) + 1)
            return own(self, *args, **kwargs)

        kind.forward = forward

    watch(FluxTransformerBlock, "blocks")
    watch(FluxSingleTransformerBlock, "blocks")
    watch(FluxAttention, "attentions")
    return counts


class Bench:
    """A system on its pipeline, with every step timed.

    Args:
        system: what is measured.
        transformer: the host it gets a copy of.
        counts: counts the forwards of all hosts.
    """

    def __init__(self, system: System, transformer: nn.Module, counts: Counts) -> None:
        self.system = system
        self.counts = counts
        self.pipe = pipeline(transformer)
        self.state_bytes = system.attach(self.pipe)
        self.calls: list[float] = []  # seconds of the transformer's calls of one run
        self.steps: list[float] = []  # seconds from their start to the end of the scheduler's step
        self.ran: list[Ran] = []
        self.warm = False
        self._started = 0.0
        self._watch_transformer()
        self._watch_scheduler()

    def _watch_transformer(self) -> None:
        """Time the module's own `__call__`, which every hook lies within."""
        host = self.pipe.transformer
        kind = type(host)

        def call(module: Any, *args: Any, **kwargs: Any) -> Any:
            self._started = time.process_time()
            output = kind.__call__(module, *args, **kwargs)
            self.calls.append(time.process_time() - self._started)
            return output

        host.__class__ = type(kind.__name__, (kind,), {"__call__": call})

    def _watch_scheduler(self) -> None:
        scheduler = self.pipe.scheduler
        step = scheduler.step

        def stepping(*args: Any, **kwargs: Any) -> Any:
            result = step(*args, **kwargs)
            self.steps.append(time.process_time() - self._started)
            self.ran.append(self.counts.take())
            if not self.warm:
                self.system.state_bytes = max(self.system.state_bytes, self.state_bytes())
            return result

        scheduler.step = stepping

    def run(self) -> None:
        """Draw once."""
        self.calls, self.steps, self.ran = [], [], []
        self.counts.take()
        run(self.pipe, self.system.num_steps)

    def measure(self) -> None:
        """Draw once and keep the median of the counted steps.

        Raises:
            ValueError: a step ran other blocks than its system runs there.
        """
        self.run()
        expected = [self.system.expected(step) for step in range(self.system.num_steps)]
        if self.ran != expected:
            raise ValueError(
                f"{self.system.name}, {self.system.tap}: blocks and attentions that ran are "
                f"{self.ran}, expected {expected}; this is not the step to be timed."
            )
        timed = self.system.timed
        self.system.seconds.append(median(self.steps[step] for step in timed))
        self.system.call_seconds.append(median(self.calls[step] for step in timed))


def measure(rounds: int) -> list[System]:
    """All systems with the median step of every round."""
    counts = count_forwards()
    transformer = flux_70m()
    size = sum(p.numel() for p in transformer.parameters())
    print(f"{HOST}: {size / 1e6:.1f} M parameters")
    benches = deque(Bench(system, transformer, counts) for system in systems())
    found = [bench.system for bench in benches]
    with threads(1), tqdm(total=(rounds + 1) * len(benches)) as progress:
        for bench in benches:
            bench.run()  # foreseer also proves its taps here
            bench.warm = True
            progress.update()
        for _ in range(rounds):
            for bench in benches:
                bench.measure()
                progress.update()
            benches.rotate(-1)
    return found


def rows(found: list[System]) -> list[dict[str, Any]]:
    """The table, without the full step itself, which is in every row."""
    full = median(found[0].seconds)
    return [
        {
            "system": system.name,
            "host": HOST,
            "tap": system.tap,
            "forecast_step_ratio": round(median(system.seconds) / full, 6),
            "state_bytes": system.state_bytes,
            "full_step_ms": round(1e3 * full, 2),
            "forecast_step_ms": round(1e3 * median(system.seconds), 4),
            "rounds": len(system.seconds),
        }
        for system in found[1:]
    ]


def table(found: list[System]) -> str:
    """The table for a person, with the spread over the rounds against the round's full step."""
    lines = [
        f"{'system':32}{'tap':24}{'ms':>9}{'call ms':>9}{'/ full':>10}"
        f"  {'min .. max of rounds':>22}{'MiB':>9}"
    ]
    whole = found[0].seconds
    for system in found:
        ratios = [own / full for own, full in zip(system.seconds, whole, strict=True)]
        if system is found[0]:
            ratios = [own / median(whole) for own in whole]
        ms, ratio = 1e3 * median(system.seconds), median(system.seconds) / median(whole)
        call_ms = 1e3 * median(system.call_seconds)
        spread = f"{min(ratios):9.3%} .. {max(ratios):8.3%}"
        lines.append(
            f"{system.name:32}{system.tap:24}{ms:9.3f}{call_ms:9.3f}{ratio:10.3%}"
            f"  {spread:>22}{system.state_bytes / 2**20:9.3f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the table and write it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(options.rounds)
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(rows(found), indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
