"""Measure what hooks and forecasts cost around a small action head in a loop of one's own.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python benchmarks/overhead_module.py

At batch 1. The head is a transformer of 4 blocks of width 128 (adaLN, 4 heads, 1.2 M random
parameters) on 16 tokens of 4 numbers, in float32. A step lasts from one time that the loop is given
to the next; its cost is CPU time on one torch thread. Plain runs, runs with every step an anchor
and runs that forecast take turns in one process; a round's number is the least of the steps of a
run after the second, since a shared machine only ever adds, the result the median over the rounds.
The first run of each kind is not counted.

Writes `benchmarks/results/overhead_module.json`; a minute.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import foreseer as fs

RESULT = Path(__file__).parent / "results" / "overhead_module.json"
NUM_STEPS, TOKENS, CHANNELS, WIDTH, BLOCKS = 10, 16, 4, 128, 4
TIMES = [1 - i / NUM_STEPS for i in range(NUM_STEPS)]
ANCHORS = (0, 1)  # so that all timed steps are forecast


class Block(nn.Module):
    """Attention and an MLP, modulated."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH, elementwise_affine=False) for _ in range(2))
        self.modulation = nn.Linear(WIDTH, 6 * WIDTH)
        self.qkv, self.project = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Tokens, and what modulates them."""
        a, b, g, d, e, h = self.modulation(c)[:, None].chunk(6, -1)
        q, k, v = (
            part.unflatten(-1, (4, -1)).transpose(1, 2)
            for part in self.qkv(self.norms[0](x) * (1 + a) + b).chunk(3, -1)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + g * self.project(mixed.transpose(1, 2).flatten(2))
        return x + h * self.mlp(self.norms[1](x) * (1 + d) + e)


class Head(nn.Module):
    """Velocity of an action chunk, given the state of a robot."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(CHANNELS, WIDTH), nn.Linear(WIDTH, CHANNELS)
        self.time, self.state = nn.Linear(1, WIDTH), nn.Linear(39, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, t: Tensor, state: Tensor) -> Tensor:
        """Noisy actions, flow time and the state of a robot."""
        c = self.time(t[:, None]) + self.state(state)
        h = self.enter(x)
        for layer in self.layers:
            h = layer(h, c)
        out: Tensor = self.leave(self.norm(h))
        return out


@torch.no_grad()
def loop(net: nn.Module, steps: Any) -> list[float]:
    """CPU seconds of every step."""
    x = torch.randn(1, TOKENS, CHANNELS, generator=torch.Generator().manual_seed(0))
    state = torch.randn(1, 39, generator=torch.Generator().manual_seed(1))
    marks = []
    for t in steps:
        marks.append(time.process_time())
        x = x - net(x, torch.full((1,), t), state) / NUM_STEPS
    marks.append(time.process_time())
    return [after - before for before, after in zip(marks, marks[1:], strict=False)]


def attached(net: nn.Module, tap: str, anchors: Any) -> Callable[[], list[float]]:
    """A run of the loop with a host attached for good."""
    own = Head().eval()
    own.load_state_dict(net.state_dict())
    run = fs.attach(fs.host(own), fs.predictors.Taylor(1), anchors=anchors, tap=tap)

    def once() -> list[float]:
        with run.steps(TIMES) as steps:
            return loop(own, steps)

    return once


def measure(rounds: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of a step of every kind, and their ratios to the plain one."""
    torch.manual_seed(0)
    net = Head().eval()
    kinds = {"plain": lambda: loop(net, TIMES)}
    for tap in ("output", "hidden"):
        kinds[f"anchor, {tap}"] = attached(net, tap, range(NUM_STEPS))
        kinds[f"forecast, {tap}"] = attached(net, tap, ANCHORS)
    for run in kinds.values():
        run()
    found: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(rounds):
        for name, run in kinds.items():
            found[name].append(min(run()[2:]))
    plain = median(found["plain"])
    ratios = {
        name: median(own / full for own, full in zip(each, found["plain"], strict=True))
        for name, each in found.items()
    }
    return {
        name: {
            "step_ms": round(1e3 * median(each), 4),
            "ratio": round(ratios[name], 4),
            "added_us": round(1e6 * (median(each) - plain), 1),
        }
        for name, each in found.items()
    }


def main() -> None:
    """Print the table and write it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(options.rounds)
    for name, row in found.items():
        print(f"{name:18}{row['step_ms']:9.3f} ms{row['ratio']:9.2%} of a plain step")
    options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
