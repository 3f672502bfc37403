"""Compare every forecaster with its original, side by side, and write `results/parity.json`.

    pip install foreseer[parity]
    python benchmarks/parity.py

Both run here, on the same inputs: state objects on random smooth trajectories, hooks on tiny FLUX
and DiT pipelines. A CPU and about a minute. What the rows mean is in docs/parity.md.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "ERROR")

import parity_cache_dit as cache_dit_rows
import parity_defects as defects
import parity_diffusers as diffusers_rows
import torch
from parity_adaptive import adaptive_rows
from parity_rows import Row
from parity_states import diffusers_rows as state_rows

RESULT = Path(__file__).parent / "results" / "parity.json"
TOLERANCE = {"float64": 1e-10, "float32": 5e-6}
"""Of the rounding where the definition is the same: state objects in float64, pipelines in
float32 over 20 sampler steps."""


def rows() -> list[Row]:
    """All comparisons."""
    return [
        *state_rows(),
        *diffusers_rows.lite_rows(),
        *diffusers_rows.default_rows(),
        *diffusers_rows.schedule_rows(),
        *diffusers_rows.residual_rows(),
        *cache_dit_rows.taylor_rows(),
        *cache_dit_rows.foca_rows(),
        *cache_dit_rows.dmd_rows(),
        *cache_dit_rows.pipeline_rows(),
        *defects.our_rows(),
        *defects.diffusers_rows(),
        *defects.cache_dit_rows(),
        *adaptive_rows(),
    ]


def main() -> None:
    """Print the table and write it.

    Raises:
        ValueError: rows of one definition differ by more than rounding.
    """
    torch.set_num_threads(1)
    found = rows()
    for row in found:
        same = "same" if row.same_definition else "differs"
        print(f"{row.max_abs_diff:9.1e}  {same:7}  {row.method} | {row.original} | {row.host}")
        print(f"{'':20}{row.note}")
    wrong = [
        row
        for row in found
        if row.same_definition
        and row.max_abs_diff > TOLERANCE["float64" if "float64" in row.host else "float32"]
    ]
    RESULT.write_text(json.dumps([asdict(row) for row in found], indent=1) + "\n")
    if wrong:
        raise ValueError(f"one definition, but the outputs differ: {wrong}; see the notes.")


if __name__ == "__main__":
    main()
