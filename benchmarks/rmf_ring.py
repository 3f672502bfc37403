"""Which law of times and which target make a good few-step student, on a ring of Gaussians.

    python benchmarks/rmf_ring.py

The teacher's velocity and average velocity are exact, so every error is the student's. Writes
benchmarks/results/rmf_ring.json: relative error of u by interval, and mean distance of samples to
the exact flow by number of steps.
"""

import json
import statistics
import time
from pathlib import Path

import torch
from flow_fields import Mixture, ring
from ring_student import Recipe, interval_error, train_on
from tqdm.auto import tqdm

from foreseer.distill.few_steps import few_steps
from foreseer.distill.meanflow import AlphaFlowTarget, MeanFlowTarget
from foreseer.distill.times import MeanFlowTimes, RestrictedTimes

OUT = Path(__file__).parent / "results" / "rmf_ring.json"
BINS = ((0.0, 0.02), (0.02, 0.1), (0.1, 0.2), (0.2, 0.4), (0.4, 1.0))
STEPS = (1, 5, 10, 20)
NUM_SAMPLES = 2000


class UniformPair(MeanFlowTimes):
    """Two uniform times, the larger is t; `equal_share` as in the base class."""

    def draw(self, size, generator=None, share=1.0):  # noqa: ANN001, ANN201, D102
        r, t = torch.rand(2, size, generator=generator).sort(0).values
        equal = torch.rand(size, generator=generator) < self.equal_share
        return torch.where(equal, t, r), t


RECIPES: dict[str, tuple[Recipe, int]] = {
    "R=0.2": (Recipe(), 3),
    "R=0.2, difference h=0.005": (Recipe(target=MeanFlowTarget(0.005)), 3),
    "R=0.2, AlphaFlow 0.05": (Recipe(target=AlphaFlowTarget(0.05)), 1),
    "R=0.2, 25 % r=t": (Recipe(times=RestrictedTimes(0.2, 0.25)), 1),
    "R=0.2, adaptive p=1": (Recipe(adaptive_power=1.0), 1),
    "R=0.2, per-pair velocity": (Recipe(teacher_velocity=False), 1),
    "R=0.4": (Recipe(times=RestrictedTimes(0.4)), 3),
    "R=1": (Recipe(times=RestrictedTimes(1.0)), 1),
    "R=1, 75 % r=t": (Recipe(times=RestrictedTimes(1.0, 0.75)), 1),
    "MeanFlow": (Recipe(times=UniformPair(), adaptive_power=1.0), 1),
    "MeanFlow, logit-normal times": (Recipe(times=MeanFlowTimes(), adaptive_power=1.0), 1),
}
"""Recipe and number of seeds of every row."""


def measure(flow: Mixture, student: torch.nn.Module) -> dict[str, float]:
    """Relative errors by interval, and distances of samples to the exact flow."""
    found = {
        f"error_{low:g}_{high:g}": interval_error(flow, student, low, high) for low, high in BINS
    }
    return found | distances(flow, student)


def distances(flow: Mixture, u) -> dict[str, float]:  # noqa: ANN001
    """Mean distance of few-step samples to where the exact flow ends."""
    eps = torch.randn(NUM_SAMPLES, 2, generator=torch.Generator().manual_seed(2))
    end = flow.move(eps, torch.zeros(NUM_SAMPLES), torch.ones(NUM_SAMPLES), 300)
    return {
        f"distance_{n}_steps": float((few_steps(u, eps, n) - end).norm(dim=1).mean()) for n in STEPS
    }


def main() -> None:
    """Train every row and write the table."""
    torch.set_num_threads(1)
    flow = ring(deviation=0.25)
    euler = distances(flow, lambda x, r, t: flow.velocity(x, t))
    rows = [{"training": "Euler with exact v", "num_seeds": 0} | euler]
    for name, (recipe, num_seeds) in tqdm(RECIPES.items(), unit="row"):
        started = time.process_time()
        found = [measure(flow, train_on(flow, recipe, seed)) for seed in range(num_seeds)]
        seconds = (time.process_time() - started) / num_seeds
        means = {key: statistics.mean(each[key] for each in found) for key in found[0]}
        spread = {
            f"{key}_spread": max(each[key] for each in found) - min(each[key] for each in found)
            for key in found[0]
            if num_seeds > 1
        }
        row = {"training": name, "num_seeds": num_seeds, "cpu_seconds": seconds}
        rows.append(row | means | spread)
        OUT.write_text(json.dumps(rows, indent=1) + "\n")
    for row in rows:
        values = [
            f"{value:.3f}"
            for key, value in row.items()
            if key.startswith(("error", "dist")) and not key.endswith("spread")
        ]
        print(f"{row['training']:32}", *values)


if __name__ == "__main__":
    main()
