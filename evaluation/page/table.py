"""Benchmark rows as Markdown and CSV, with the gap between learned and untrained methods."""

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from foreseer.evaluation.results import BenchRow
from foreseer.evaluation.solvers import SOLVERS
from foreseer.predictors.rules import TABLED

README_BUDGETS = (11, 8, 6)
NAMED_RIVALS = (*SOLVERS, *TABLED, "l2p_adam", "l2p_lstsq", "l2p_closed_loop")
COLUMNS = ("method", "kind", "tap", "anchors", "PSNR mean [95 % CI]", "median", "q10 to q90") + (
    "SSIM",
    "latent rel. L2",
)


@dataclass(frozen=True)
class Gap:
    """The best learned row and the best of everything else, at equal evaluations and guidance."""

    learned: BenchRow
    other: BenchRow

    @property
    def psnr_db(self) -> float:
        """PSNR of the learned row minus that of the other; 0 when both are exact."""
        if self.learned.psnr_db == self.other.psnr_db:
            return 0.0
        return self.learned.psnr_db - self.other.psnr_db

    @property
    def intervals_overlap(self) -> bool:
        """Whether the 95 % intervals of the two means overlap."""
        return (
            self.learned.psnr_ci_low <= self.other.psnr_ci_high
            and self.other.psnr_ci_low <= self.learned.psnr_ci_high
        )

    def sentence(self) -> str:
        """The gap in words."""
        overlap = "overlap" if self.intervals_overlap else "do not overlap"
        return (
            f"Best learned minus best of everything else at {self.learned.num_anchors} evaluations:"
            f" {self.psnr_db:+.2f} dB ({self.learned.method} {decibels(self.learned.psnr_db)},"
            f" {self.other.method} {decibels(self.other.psnr_db)}; 95 % intervals {overlap})"
        )


def best_rows(rows: Iterable[BenchRow], *keys: str) -> list[BenchRow]:
    """The row with the highest mean PSNR of each group that agrees on `keys`.

    Groups never mix guidance scales or numbers of evaluations. The result is ordered by guidance
    scale, then evaluations (most first), then PSNR (best first). Full runs are left out.

    Args:
        rows: rows of one benchmark.
        keys: fields that tell groups apart, such as `method` and `tap`.
    """
    best: dict[tuple, BenchRow] = {}
    for row in rows:
        group = (row.guidance_scale, row.num_anchors, *(getattr(row, key) for key in keys))
        if row.kind != "full" and (group not in best or row.psnr_db > best[group].psnr_db):
            best[group] = row
    return sorted(best.values(), key=lambda r: (r.guidance_scale, -r.num_anchors, -r.psnr_db))


def gaps(rows: Sequence[BenchRow]) -> list[Gap]:
    """One gap per guidance scale and number of evaluations at which both sides were measured."""
    learned = {budget(r): r for r in best_rows(r for r in rows if r.kind == "learned")}
    others = {budget(r): r for r in best_rows(r for r in rows if r.kind != "learned")}
    return [Gap(row, others[key]) for key, row in learned.items() if key in others]


def verdict(rows: Sequence[BenchRow]) -> str:
    """Whether learned forecasting beats everything else, in one or two sentences."""
    found = gaps(rows)
    if not found:
        return "No verdict: learned and untrained methods never ran with equal evaluations."
    if len(found) == 1:
        overlap = "overlap" if found[0].intervals_overlap else "do not overlap"
        told = "ahead of" if found[0].psnr_db > 0 else "not ahead of"
        return (
            f"At equal evaluations the best learned predictor is {told} every solver and formula: "
            f"{found[0].psnr_db:+.2f} dB of PSNR to the best of them; the 95 % intervals {overlap}."
        )
    ahead = [gap for gap in found if gap.psnr_db > 0]
    clear = sum(not gap.intervals_overlap for gap in ahead)
    low, high = min(gap.psnr_db for gap in found), max(gap.psnr_db for gap in found)
    return (
        f"At equal evaluations the best learned predictor is ahead of every solver and formula in "
        f"{len(ahead)} of {len(found)} settings, in {clear} of them with 95 % intervals that do "
        f"not overlap. The gap runs from {low:+.2f} to {high:+.2f} dB of PSNR."
    )


def budget(row: BenchRow) -> tuple[float, int]:
    """What must be equal for two rows to be compared: guidance scale and evaluations."""
    return row.guidance_scale, row.num_anchors


def blocks(rows: Sequence[BenchRow]) -> dict[tuple[float, int], list[BenchRow]]:
    """Best row of every method and tap, grouped by budget."""
    grouped: dict[tuple[float, int], list[BenchRow]] = {}
    for row in best_rows(rows, "method", "tap"):
        grouped.setdefault(budget(row), []).append(row)
    return grouped


def markdown_table(rows: Sequence[BenchRow]) -> str:
    """One Markdown table per budget: each method and tap on its best anchor list, then the gap."""
    gap_of = {budget(gap.learned): gap for gap in gaps(rows)}
    parts = []
    for key, block in blocks(rows).items():
        lines = [f"### {key[1]} evaluations, guidance {key[0]:g}", ""]
        lines += _header(COLUMNS)
        lines += [_line(_cells(row)) for row in block]
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
        for kind in ("learned", "formula", "solver"):
            best = best_rows(row for row in here if row.kind == kind)
            cells = {r.num_anchors: f"{decibels(r.psnr_db)} ({r.method})" for r in best}
            lines += _short_line(f"best {kind}", cells, budgets)
        for method in NAMED_RIVALS:
            best = best_rows(row for row in here if row.method == method)
            cells = {row.num_anchors: decibels(row.psnr_db) for row in best}
            lines += _short_line(f"`{method}`", cells, budgets)
        cells = {gap.learned.num_anchors: f"**{gap.psnr_db:+.2f}**" for gap in gaps(here)}
        lines += _short_line("**best learned minus best of everything else**", cells, budgets)
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def save_csv(rows: Sequence[BenchRow], path: Path) -> None:
    """Write every row as one CSV line; None is an empty cell."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(BenchRow)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def decibels(value: float) -> str:
    """A PSNR with two decimals, or `exact` when nothing differs."""
    return "exact" if value == math.inf else f"{value:.2f}"


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
    ]


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
