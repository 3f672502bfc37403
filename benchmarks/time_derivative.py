"""How noisy the teacher's time derivative is, and what a band limit does to it.

    python benchmarks/time_derivative.py

One random point on each of 32 recorded runs of the bundled teacher (drawn where they are missing):
what the limit changes in the output, |du/dt| along the run relative to |v|, and how far a central
difference at h = 0.005 is from the exact product. Prints the numbers of docs/distill.md.
"""

import torch
from torch.utils.data import DataLoader

from foreseer.distill.meanflow import MeanFlowTarget, difference, exact_derivative
from foreseer.distill.module import DistillModule
from foreseer.distill.teacher_runs import RunDataset, TeacherRuns
from foreseer.distill.times import RestrictedTimes

FOLDER = "runs/distill/teacher_runs"
LIMITS = (None, 500.0, 200.0, 100.0, 60.0, 30.0, 15.0)


def main() -> None:
    """Print a row per limit."""
    torch.set_num_threads(1)
    runs = TeacherRuns(FOLDER, num_runs=31, num_validation=1)
    runs.draw()
    first = RunDataset([runs.folder / "runs.00000.safetensors"], runs.runs_per_file)
    batch = next(iter(DataLoader(first, batch_size=runs.runs_per_file)))
    plain = None
    print("band limit | change of the output | |du/dt| / |v| | difference against product")
    for limit in LIMITS:
        module = DistillModule(MeanFlowTarget(), RestrictedTimes(), band_limit=limit).eval()
        at = module.points(batch, generator=torch.Generator().manual_seed(0))
        u = module.average_velocity(at.conditions, at.guidance_scale)
        with torch.no_grad():
            output = u(at.x_t, at.t, at.t)
        plain = output if plain is None else plain
        exact = exact_derivative(u, at.x_t, at.r, at.t, at.v)
        near = difference(u, at.x_t, at.r, at.t, at.v, 5e-3)
        change, size = (output - plain).norm() / plain.norm(), exact.norm() / at.v.norm()
        gap = (near - exact).norm() / exact.norm()
        print(f"{limit} | {float(change):.4f} | {float(size):.2f} | {float(gap):.3f}", flush=True)


if __name__ == "__main__":
    main()
