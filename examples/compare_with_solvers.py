"""A learned predictor next to solvers and formulas, at the same number of network evaluations.

    python examples/compare_with_solvers.py FOLDER

Two samples and one budget, so that it takes seconds: the numbers scatter by several dB.
`foreseer bench` with its 64 samples is what to believe.
"""

import sys
from pathlib import Path

from foreseer import bench
from foreseer.evaluation.results import load_rows

out = Path(sys.argv[1])
bench(
    pipeline="zoo:fashion_dit",
    out=str(out),
    budgets=[8],
    num_samples=2,
    predictors=["l2p=zoo:fashion_dit_l2p_8"],
    methods=["euler", "dpmpp_2m", "taylor_1"],
    batch_size=2,
)
best: dict[str, float] = {}  # of every method, on the list of anchors that suits it
for row in load_rows(out / "results.json"):
    if row.kind != "full":
        best[row.method] = max(row.psnr_db, best.get(row.method, row.psnr_db))
for method, psnr_db in sorted(best.items(), key=lambda pair: -pair[1]):
    print(f"{method:<10}{psnr_db:.1f} dB at 8 evaluations")
