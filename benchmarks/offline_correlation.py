"""How well the offline errors of `foreseer inspect` order samples that were really generated.

Spearman's rank correlation of each error with the closed-loop PSNR over all rows of a benchmark:

    python benchmarks/offline_correlation.py RECORDING benchmarks/results/fashion_dit.json
    python benchmarks/offline_correlation.py RECORDING benchmarks/results/readout.json emoji_flux
"""

import json
import sys
from pathlib import Path

import torch

from foreseer.evaluation.offline import LEARNED, OfflineRow, TapGrams
from foreseer.predictors.rules import RULES
from foreseer.trajectories.recording import Recording

ERRORS = ("open_loop_error", "integrated_error", "accumulated_error")


def ranks(values: list[float]) -> torch.Tensor:
    """Rank of every value, equal values sharing the mean of theirs, minus the mean rank."""
    found = torch.tensor(values, dtype=torch.float64)
    above = (found[:, None] > found).double().sum(1)
    shared = (found[:, None] == found).double().sum(1)
    rank = above + (shared - 1) / 2
    return rank - rank.mean()


def spearman(errors: list[float], psnr: list[float]) -> float:
    """Rank correlation, positive when a smaller error goes with a higher PSNR."""
    a, b = ranks([-error for error in errors]), ranks(psnr)
    return float(a @ b / (a.norm() * b.norm()))


def main(recording: str, results: str, host: str | None = None) -> None:
    """Print the correlations over all rows, of a host where told, per tap and among the best."""
    opened = Recording(recording)
    grams = {
        tap: TapGrams(tap, opened.stack(f"gram/{tap}"), opened.header.sigmas)
        for tap in ("output", "hidden")
    }
    found: list[tuple[OfflineRow, float]] = []
    for row in json.loads(Path(results).read_text()):
        known = row["method"] in (*RULES, LEARNED) and row["tap"] in grams
        if known and (host is None or row["host"] == host):
            anchors = tuple(map(int, row["anchors"].split()))
            measured = grams[row["tap"]].measure(row["method"], row["anchors_name"], anchors)
            found.append((measured, row["psnr_db"]))
    top = {
        n: max(psnr for row, psnr in found if row.num_anchors == n)
        for n in (11, 8, 6, 4)
        if any(row.num_anchors == n for row, _ in found)
    }
    groups = {"all rows": found}
    groups |= {f"tap {tap}": [one for one in found if one[0].tap == tap] for tap in grams}
    groups |= {f"{n} evaluations": [one for one in found if one[0].num_anchors == n] for n in top}
    groups |= {
        f"{n} evaluations, within 4 dB of the best": [
            one for one in found if one[0].num_anchors == n and one[1] > best - 4
        ]
        for n, best in top.items()
    }
    print(f"{'rows':<44}{'number':>8}" + "".join(f"{name:>20}" for name in ERRORS))
    for name, group in groups.items():
        psnr = [value for _, value in group]
        cells = (spearman([getattr(row, error) for row, _ in group], psnr) for error in ERRORS)
        print(f"{name:<44}{len(group):>8}" + "".join(f"{cell:>20.3f}" for cell in cells))


if __name__ == "__main__":
    main(*sys.argv[1:])
