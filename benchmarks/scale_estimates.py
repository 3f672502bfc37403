"""Arithmetic, not measurements: what recording FLUX, Qwen-Image or HunyuanVideo takes.

Every number follows from the table `MODELS` and from the rates measured by `scale.py` on its own
machine. `docs/scale.md` labels them as estimates.
"""

import math
from dataclasses import dataclass
from typing import Any

STEPS = 50
PROMPTS = 256
GPUS = (1, 8, 128)


@dataclass(frozen=True)
class Model:
    """One model at one size.

    Args:
        name: model and size.
        tokens: picture tokens of one sample.
        width: channels of the hidden tap.
        branches: guidance branches.
        run_s: seconds of a full run of 50 steps, as published.
        source: where those were published, and on what.
    """

    name: str
    tokens: int
    width: int
    branches: int
    run_s: float
    source: str


MODELS = (
    Model(
        "FLUX.1-dev, 1024 x 1024",
        4096,
        3072,
        1,
        26.25,
        "full run of the L2P paper's table (arXiv 2604.26365)",
    ),
    Model(
        "Qwen-Image, 1328 x 1328",
        6889,
        3072,
        2,
        127.40,
        "full run of the L2P paper's table (arXiv 2604.26365)",
    ),
    Model(
        "HunyuanVideo, 704 x 704, 129 frames",
        44 * 44 * 33,
        3072,
        2,
        1155.0 * 4,
        "DisCa's full run on four H20 in parallel, 1155 s (arXiv 2602.05449), times four",
    ),
)


def estimates(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per model and number of GPUs.

    Args:
        measured: sections of `scale.json`; `write` and `gram` are used where they are there.

    Returns:
        Hours for `PROMPTS` trajectories when every GPU records its share on its own, bytes of what
        is stored, what the recorder keeps in memory, and the share of its time that writing full
        features or making Grams on one CPU core would take at the rates measured here.
    """
    rows = []
    for model in MODELS:
        feature = 2 * model.tokens * model.width * model.branches
        grams = 8 * model.branches * STEPS**2
        row: dict[str, Any] = {
            "model": model.name,
            "run_s": model.run_s,
            "source": model.source,
            "gram_bytes_each": grams,
            "feature_bytes_each": STEPS * feature,
            "memory_bytes_per_sample": STEPS * feature,
            "gram_flops_each": 2 * STEPS**2 * model.tokens * model.width * model.branches,
            "all_grams_bytes": PROMPTS * grams,
            "all_features_bytes": PROMPTS * STEPS * feature,
        }
        if "gram" in measured:
            gflops = measured["gram"]["gram"]["gflops"]
            row["gram_s_on_one_core_here"] = row["gram_flops_each"] / gflops / 1e9
        if "write" in measured:
            rate = measured["write"]["shards, 1 process"]["mb_per_s"]
            row["write_s_here"] = STEPS * feature / rate / 1e6
        for gpus in GPUS:
            row[f"hours_{gpus}"] = math.ceil(PROMPTS / gpus) * model.run_s / 3600
        rows.append(row)
    return rows
