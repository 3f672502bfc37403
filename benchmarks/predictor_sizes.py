"""Bytes of predictor files for the shapes of large models, written with random numbers.

Rows and readouts of 8 anchors in 50 steps; the table of docs/use_it_in.md is what this prints:
`python benchmarks/predictor_sizes.py`.
"""

import tempfile
from pathlib import Path

import torch

import foreseer as fs
from foreseer.checkpoints.spec import PredictorSpec
from foreseer.predictors import L2P, Readout

STEPS = 50
ANCHORS = (0, 1, 2, 5, 11, 20, 31, 42)
SHAPES = {  # hidden channels, elements of a token in the output, guidance branches
    "FLUX.1-dev": (3072, 64, 1),
    "Qwen-Image": (3072, 64, 2),
    "Wan 2.2 A14B": (5120, 64, 2),
}
RANKS = (22, 64)


def size(predictor: torch.nn.Module, branches: int) -> int:
    """Bytes of everything that is written for a predictor of random numbers."""
    for buffer in predictor.buffers():
        buffer.copy_(torch.randn(buffer.shape).to(buffer.dtype))
    predictor.weight.tril_(-1)
    predictor.spec = PredictorSpec(
        tap="output",
        anchors=ANCHORS,
        sigmas=tuple(1 - i / STEPS for i in range(STEPS)),
        host={"class": "Transformer", "parameters": 0, "config_sha256": "", "weights_sha256": ""},
        scheduler="FlowMatchEulerDiscreteScheduler",
        num_branches=branches,
        guidance_scale=1.0,
        dtype="bfloat16",
    )
    with tempfile.TemporaryDirectory() as folder:
        fs.save(predictor, folder)
        return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def main() -> None:
    """Print the table."""
    print("| model | rows | " + " | ".join(f"readout, r = {rank}" for rank in RANKS) + " |")
    print("| --- | --- |" + " --- |" * len(RANKS))
    for name, (width, patch, branches) in SHAPES.items():
        found = [size(L2P(STEPS, ANCHORS, branches), branches)]
        for rank in RANKS:
            readout = Readout(STEPS, ANCHORS, branches, width=width, patch=patch, rank=rank, past=2)
            found.append(size(readout, branches))
        print(f"| {name} | " + " | ".join(f"{each:,}" for each in found) + " |")


if __name__ == "__main__":
    main()
