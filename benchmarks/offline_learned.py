"""What the offline estimate says of least-squares rows, against closed-loop PSNR on the same lists.

    python benchmarks/offline_learned.py RECORDING benchmarks/results/reference_table.json

One line per tap and list of anchors: the estimated and the measured gain over the formula that the
estimate puts first. Rows are fitted on the even trajectories and estimated on the odd ones.
"""

import json
import math
from pathlib import Path

from jsonargparse import auto_cli

from foreseer.predictors.rules import RULES
from foreseer.predictors.solve import least_squares_rows
from foreseer.trajectories.gram import accumulated_error, spread
from foreseer.trajectories.recording import Recording

FORMULAS = ("reuse", "taylor_1", "taylor_2", "damped_half")


def offline_learned(recording: str, results: str) -> None:
    """Print the comparison.

    Args:
        recording: folder of a recording with Grams of `output` and `hidden`.
        results: rows of a benchmark of the same model with `l2p_lstsq` on both taps.
    """
    source = Recording(recording)
    sigmas = source.header.sigmas
    rows = json.loads(Path(results).read_text())
    measured = {(row["method"], row["tap"], row["anchors"]): row["psnr_db"] for row in rows}
    lists = sorted({row["anchors"] for row in rows if row["method"] == "l2p_lstsq"}, key=len)
    for tap in ("output", "hidden"):
        grams = source.stack(f"gram/{tap}")
        fitted, held = grams[::2], grams[1::2].double()
        unit = float(spread(held).square().mean().sqrt())
        for text in lists:
            anchors = tuple(map(int, text.split()))
            tables = {"l2p_lstsq": least_squares_rows(fitted.sum(0), anchors)}
            for name in FORMULAS:
                rule = RULES[name].rows(anchors, sigmas)[:, 0]
                tables[name] = rule.repeat(source.header.num_branches, 1, 1)
            estimate = {}
            for name, table in tables.items():
                errors = accumulated_error(held, table, sigmas)
                estimate[name] = -20 * math.log10(float(errors.square().mean().sqrt()) / unit)
            best = max(FORMULAS, key=lambda name, found=estimate: found[name])
            gain = estimate["l2p_lstsq"] - estimate[best]
            truth = measured["l2p_lstsq", tap, text] - measured[best, tap, text]
            print(
                f"{tap:<7}{len(anchors):>3} over {best:<12}{gain:+5.1f} estimated{truth:+5.1f} dB"
            )


if __name__ == "__main__":
    auto_cli(offline_learned)
