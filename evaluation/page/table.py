"""Benchmark rows as Markdown and CSV, with the gap between ours and everything else."""

import csv
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

from foreseer.evaluation.advice import advice, best_rows, budget, gaps
from foreseer.evaluation.results import BenchRow, decibels
from foreseer.evaluation.solvers import SOLVERS
from foreseer.predictors.rules import TABLED

README_BUDGETS = (11, 8, 6)
NAMED_RIVALS = (*SOLVERS, *TABLED, "l2p_adam", "l2p_lstsq", "l2p_closed_loop")
COLUMNS = ("method", "kind", "tap", "anchors", "PSNR mean [95 % CI]", "median", "q10 to q90") + (
    "SSIM",
    "latent rel. L2",
    "minus its rival [paired 95 %]",
    "ahead on",
)
IF_MEASURED = {"st_lpips": "ST-LPIPS", "fine_psnr_db": "PSNR to the finer run"}
"""Headings of what is measured only when asked for, by field."""


def blocks(rows: Sequence[BenchRow]) -> dict[tuple[float, int], list[BenchRow]]:
    """Best row of every method and tap, grouped by budget."""
    grouped: dict[tuple[float, int], list[BenchRow]] = {}
    for row in best_rows(rows, "method", "tap"):
        grouped.setdefault(budget(row), []).append(row)
    return grouped


def markdown(rows: Sequence[BenchRow], budgets: Sequence[int] = README_BUDGETS) -> str:
    """What to use, the short table and the long ones.

    Args:
        rows: rows of one benchmark.
        budgets: numbers of evaluations in the short table.
    """
    told = "\n".join(f"- {sentence}" for sentence in advice(rows))
    for row in rows:
        if row.kind == "full" and row.fine_psnr_db is not None:
            told += (
                f"\n- the full run of {row.num_anchors} steps is itself "
                f"{decibels(row.fine_psnr_db)} dB from the finer run"
            )
    return f"{told}\n\n{short_table(rows, budgets)}\n{markdown_table(rows)}"


def markdown_table(rows: Sequence[BenchRow]) -> str:
    """One Markdown table per budget: each method and tap on its best anchor list, then the gap."""
    gap_of = {budget(gap.learned): gap for gap in gaps(rows)}
    parts = []
    for key, block in blocks(rows).items():
        lines = [f"### {key[1]} evaluations, guidance {key[0]:g}", ""]
        extra = measured(rows)
        lines += _header([*COLUMNS, *extra.values()])
        lines += [_line(_cells(row) + [_optional(row, name) for name in extra]) for row in block]
        lines += ["", f"**{gap_of[key].sentence()}**" if key in gap_of else _no_gap(block)]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def short_table(rows: Sequence[BenchRow], budgets: Sequence[int] = README_BUDGETS) -> str:
    """A Markdown table of mean PSNR for a README, one per guidance scale.

    Rows are the best of each kind and the named rivals that were measured, each on its best tap
    and anchor list; the last row is the gap between learned and everything else.

    Args:
        rows: rows of one benchmark.
        budgets: numbers of evaluations, one column each.
    """
    parts = []
    for scale in sorted({row.guidance_scale for row in rows if row.kind != "full"}):
        here = [r for r in rows if r.guidance_scale == scale and r.num_anchors in budgets]
        lines = _header([f"PSNR in dB, guidance {scale:g}", *(f"{b} evaluations" for b in budgets)])
        for kind in ("learned", "formula", "learned solver", "solver"):
            best = best_rows(row for row in here if row.kind == kind)
            cells = {r.num_anchors: f"{decibels(r.psnr_db)} ({r.method})" for r in best}
            lines += _short_line(f"best {kind}", cells, budgets)
        for method in NAMED_RIVALS:
            best = best_rows(row for row in here if row.method == method)
            cells = {row.num_anchors: decibels(row.psnr_db) for row in best}
            lines += _short_line(f"`{method}`", cells, budgets)
        cells = {
            gap.learned.num_anchors: f"**{gap.psnr_db:+.2f}**{_ends(gap.learned)}"
            for gap in gaps(here)
        }
        lines += _short_line("**best learned minus best of everything else**", cells, budgets)
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def save_csv(rows: Sequence[BenchRow], path: Path) -> None:
    """Write every row as one CSV line; None is an empty cell."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(BenchRow)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def _cells(row: BenchRow) -> list[str]:
    """The cells of one row of the long table."""
    interval = f"[{decibels(row.psnr_ci_low)}, {decibels(row.psnr_ci_high)}]"
    return [
        row.method,
        row.kind,
        row.tap,
        f"{row.anchors_name}: {row.anchors}",
        f"{decibels(row.psnr_db)} {interval}",
        decibels(row.psnr_median),
        f"{decibels(row.psnr_q10)} to {decibels(row.psnr_q90)}",
        f"{row.ssim:.4f}",
        f"{row.latent_rel_l2:.4f}",
        difference(row),
        "–" if row.wins is None else f"{row.wins} of {row.num_samples}",
    ]


def measured(rows: Sequence[BenchRow]) -> dict[str, str]:
    """Headings of what was measured because it was asked for, by field."""
    return {
        name: heading
        for name, heading in IF_MEASURED.items()
        if any(getattr(row, name) is not None for row in rows)
    }


def difference(row: BenchRow) -> str:
    """What a row is ahead of its rival by, on the same samples, with the interval."""
    if row.paired_db is None:
        return "–"
    low, high = row.paired_low_db, row.paired_high_db
    return f"{row.paired_db:+.2f} [{low:+.2f}, {high:+.2f}] {row.rival}"


def _ends(row: BenchRow) -> str:
    """The interval of a paired difference, where it is known."""
    if row.standing is None:
        return ""
    return f" ({row.paired_low_db:+.2f} to {row.paired_high_db:+.2f})"


def _optional(row: BenchRow, name: str) -> str:
    value = getattr(row, name)
    return "–" if value is None else f"{value:.3g}" if name == "st_lpips" else decibels(value)


def _short_line(label: str, cells: dict[int, str], budgets: Sequence[int]) -> list[str]:
    """One line of the short table, or none when nothing was measured."""
    return [_line([label, *(cells.get(count, "–") for count in budgets)])] if cells else []


def _no_gap(block: Sequence[BenchRow]) -> str:
    """Why a block has no gap."""
    missing = "learned" if all(row.kind != "learned" for row in block) else "untrained"
    return f"No gap to report: no {missing} method was measured at this budget."


def _header(cells: Sequence[str]) -> list[str]:
    """The two lines that open a Markdown table."""
    return [_line(cells), _line(["---"] * len(cells))]


def _line(cells: Sequence[str]) -> str:
    """One line of a Markdown table."""
    return f"| {' | '.join(cells)} |"
