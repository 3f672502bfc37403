"""Write everything a benchmark leaves behind: rows, tables, figures and one self-contained page.

Shapes: B samples, C channels, H height, W width, S sampling steps.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from foreseer import __version__
from foreseer.evaluation.advice import advice, compared, gaps
from foreseer.evaluation.page import figures
from foreseer.evaluation.page.compare import address, comparison
from foreseer.evaluation.page.figures import Curves, Weights
from foreseer.evaluation.page.heat import Timeline
from foreseer.evaluation.page.sheet import against
from foreseer.evaluation.page.table import (
    blocks,
    difference,
    markdown,
    measured,
    save_csv,
)
from foreseer.evaluation.page.template import (
    Cell,
    Section,
    facts,
    page,
    picture,
    save_figures,
    sortable,
    tile,
)
from foreseer.evaluation.results import (
    RESULTS_FILE,
    BenchMeta,
    BenchRow,
    decibels,
    save_meta,
    save_rows,
)

TEXT_COLUMNS = ("method", "kind", "tap", "anchors")


def write_report(
    rows: Sequence[BenchRow],
    meta: BenchMeta,
    images: Mapping[str, Float[Tensor, "B C H W"]],
    out: Path,
    step_errors: Curves | None = None,
    weights: Mapping[str, Weights] | None = None,
) -> Path:
    """Write the results, tables, figures and the HTML page of a benchmark into one folder.

    The files are results.json, results.meta.json, results.csv, results.md, report.html,
    contact_sheet.png and a PNG of every figure of the page.

    Args:
        rows: rows of one benchmark.
        meta: how the rows were made.
        images: label to samples in [0, 1], the full run's first.
        out: folder to write, made when missing.
        step_errors: label to (step, relative error) pairs of the sampler's state after the step.
        weights: caption to the rows of a linear predictor's branch, and its anchors.

    Returns:
        Path of the HTML page, which needs no other file and no network.

    Raises:
        ValueError: there is no row.
    """
    if not rows:
        raise ValueError("Expected at least one benchmark row, got none; did every method fail?")
    out.mkdir(parents=True, exist_ok=True)
    save_rows(rows, out / RESULTS_FILE)
    save_meta(meta, out / RESULTS_FILE)
    save_csv(rows, out / "results.csv")
    told = advice(rows)
    (out / "results.md").write_text(markdown(rows))
    sections = [
        _pareto(rows),
        _samples(images, out / "contact_sheet.png"),
        _methods(rows),
        *_inside(rows, step_errors or {}, weights or {}, meta),
        Section("again", "Run it again", f"<pre>{escape(meta.command)}</pre>\n{_facts(meta)}"),
    ]
    text = page("bench", _context(rows, meta), told, sections, __version__, _tiles(rows))
    (out / "report.html").write_text(text)
    save_figures(sections, out)
    return out / "report.html"


def _pareto(rows: Sequence[BenchRow]) -> Section:
    """Quality against cost."""
    charts = figures.pareto(rows)
    nothing = "<p>Every method reproduces the full run exactly, so there is no curve to draw.</p>"
    return Section("pareto", "Quality against cost", "" if charts else nothing, figures=charts)


def _methods(rows: Sequence[BenchRow]) -> Section:
    """All methods as tables."""
    note = (
        "Each method and tap on the best of its anchor lists, chosen by mean PSNR on the samples "
        "of this report; every list is in results.csv. Brackets hold the bootstrap 95 % interval "
        "of the mean; a tenth of the samples lies below q10, a tenth above q90. Minus its rival: "
        "the difference on the same samples, with its own interval; the rival of a learned "
        "predictor is the best of everything else, of others the best learned. Press a heading to "
        "sort."
    )
    return Section("methods", "All methods", _tables(rows), note)


def _samples(images: Mapping[str, Tensor], path: Path) -> Section:
    """The slider, and all samples at once, which are written to a file too."""
    sheet = against(images)
    sheet.save(path)
    longer = max(next(iter(images.values())).shape[-2:])
    body = picture(
        "Every sample shown, a row per method; dark strips: four times the absolute difference "
        "to the full run",
        address(sheet, longer),
    )
    if len(images) > 1:
        caption = "Drag the divider, or focus it and use the arrow keys."
        body = f"{comparison(caption, images)}\n{body}"
    return Section("samples", "Samples side by side", body)


def _inside(
    rows: Sequence[BenchRow],
    step_errors: Curves,
    weights: Mapping[str, Weights],
    meta: BenchMeta,
) -> list[Section]:
    """What lies behind the numbers: error per step, anchors, weights."""
    lists = anchor_lists(rows)
    num_steps = max(row.steps[-1] for row in rows) + 1
    learned = {row.anchors for row in rows if row.kind == "learned"}
    strong = [label for label, steps in lists.items() if " ".join(map(str, steps)) in learned]
    found = []
    if step_errors:
        chart = figures.state_errors(rows, step_errors)
        found.append(Section("steps", "Error after each step", figures={"step_errors": chart}))
    if lists:
        caption = (
            "Steps at which the network runs, one line per anchor list. Bold: lists that learned "
            "predictors run on."
        )
        drawn = {"timeline": Timeline(caption, lists, num_steps, strong)}
        found.append(Section("anchors", "Where the network runs", _searches(meta), figures=drawn))
    if weights:
        note = (
            "A line per forecast step: how much of each computed feature goes into its forecast. "
            "Plain reuse is a one on the newest anchor."
        )
        maps = figures.weight_maps(weights)
        found.append(Section("weights", "What is added up", note=note, figures=maps))
    return found


def _searches(meta: BenchMeta) -> str:
    """What the lists of solvers and formulas took to find."""
    if meta.lists:
        return f"<h3>What the searches took</h3>\n{facts(meta.lists)}"
    return (
        '<p class="soft">No list was searched for solvers and formulas here: they ran on the '
        "common lists and on those of the learned predictors.</p>"
    )


def anchor_lists(rows: Sequence[BenchRow]) -> dict[str, tuple[int, ...]]:
    """Every anchor list of a benchmark once, labelled, most evaluations first.

    A searched list is labelled with the methods that use it, since each method has its own.
    """
    users: dict[tuple[int, str, str], dict[str, BenchRow]] = {}
    for row in rows:
        if row.kind != "full":
            key = (-row.num_anchors, row.anchors_name, row.anchors)
            users.setdefault(key, {})[row.method] = row
    lists: dict[str, tuple[int, ...]] = {}
    for (_, name, _), methods in sorted(users.items(), key=lambda item: item[0]):
        row = next(iter(methods.values()))
        label = f"{row.num_anchors} {name}"
        if name == "searched":
            more = f" and {len(methods) - 2} more" if len(methods) > 2 else ""
            label += f" ({', '.join(list(methods)[:2])}{more})"
        same = sum(known.startswith(label) for known in lists)  # another guidance scale or tap
        lists[f"{label}, list {same + 1}" if same else label] = row.steps
    return lists


def _context(rows: Sequence[BenchRow], meta: BenchMeta) -> str:
    """Day, machine and what the full run costs."""
    full = [
        f"full run at guidance {row.guidance_scale:g}: {row.num_anchors} evaluations"
        + (f", {row.seconds_per_image:.2f} s per image" if row.seconds_per_image else "")
        + (f", {decibels(row.fine_psnr_db)} dB from the finer run" if row.fine_psnr_db else "")
        for row in rows
        if row.kind == "full"
    ]
    samples = max(row.num_samples for row in rows)
    return "; ".join([meta.date, meta.hardware, f"{samples} held-out samples", *full])


def _tiles(rows: Sequence[BenchRow]) -> list[str]:
    """One tile per budget with the gap between learned and everything else."""
    return [
        tile(
            f"{gap.learned.num_anchors} evaluations, guidance {gap.learned.guidance_scale:g}",
            f"{gap.psnr_db:+.2f} dB",
            f"{gap.learned.method} {decibels(gap.learned.psnr_db)}, "
            f"{gap.other.method} {decibels(gap.other.psnr_db)}; {compared(gap.learned)}",
            {"ahead": True, "behind": False}.get(gap.learned.standing or ""),
        )
        for gap in gaps(rows)
    ]


def _tables(rows: Sequence[BenchRow]) -> str:
    """One sortable table per budget, the first one open."""
    sentences = {
        (gap.learned.guidance_scale, gap.learned.num_anchors): gap.sentence() for gap in gaps(rows)
    }
    parts: list[str] = []
    for (scale, evaluations), block in blocks(rows).items():
        head = f"{evaluations} evaluations, guidance {scale:g}"
        extra = measured(rows)
        lines = [(row.kind, _cells(row) | _asked_for(row, extra)) for row in block]
        gap = sentences.get((scale, evaluations))
        parts.append(
            f'<details class="block"{"" if parts else " open"}><summary><b>{head}</b>'
            f"{f'<br>{escape(gap)}' if gap else ''}</summary>\n"
            f"{sortable(lines, head, TEXT_COLUMNS, ('anchors',))}</details>"
        )
    return "\n".join(parts)


def _cells(row: BenchRow) -> dict[str, Cell]:
    """Column heading to what a row shows there and sorts by."""
    interval = f"[{decibels(row.psnr_ci_low)}, {decibels(row.psnr_ci_high)}]"
    kib = None if row.state_bytes is None else row.state_bytes / 1024
    return {
        "method": (row.method, row.method),
        "PSNR mean (dB)": (f"{decibels(row.psnr_db)} {interval}", _sortable(row.psnr_db)),
        "minus its rival (dB)": (difference(row), row.paired_db),
        "ahead on": _number(row.wins, "d"),
        "median": (decibels(row.psnr_median), _sortable(row.psnr_median)),
        "q10": (decibels(row.psnr_q10), _sortable(row.psnr_q10)),
        "q90": (decibels(row.psnr_q90), _sortable(row.psnr_q90)),
        "SSIM": (f"{row.ssim:.4f}", row.ssim),
        "latent rel. L2": (f"{row.latent_rel_l2:.4f}", row.latent_rel_l2),
        "kind": (row.kind, row.kind),
        "tap": (row.tap, row.tap),
        "anchors": (f"{row.anchors_name}: {row.anchors}", row.anchors_name),
        "forecast / full step": _number(row.forecast_step_ratio, ".3f"),
        "state (KiB)": _number(kib, ".0f"),
        "fit (evaluations each)": _number(row.fit_evaluations, "g"),
        "fit (s)": _number(row.fit_seconds, ".1f"),
        "fitted on": _number(row.num_trajectories, "d"),
        "FLOPs / full run": _number(row.flops_ratio, ".3f"),
        "s per image": _number(row.seconds_per_image, ".3f"),
    }


def _asked_for(row: BenchRow, headings: Mapping[str, str]) -> dict[str, Cell]:
    """Cells of what is measured only when asked for."""
    return {
        heading: _number(getattr(row, name), ".3g" if name == "st_lpips" else ".2f")
        for name, heading in headings.items()
    }


def _number(value: int | float | None, form: str) -> Cell:
    """A cell for a number that may not have been measured."""
    return ("–", None) if value is None else (format(value, form), value)


def _sortable(value: float) -> float:
    """A finite stand-in for infinity, which the page's script cannot read."""
    return 1e9 if value == math.inf else value


def _facts(meta: BenchMeta) -> str:
    """Versions, seeds and machine as a definition list."""
    seeds = ", ".join(map(str, meta.seeds[:8])) + (", ..." if len(meta.seeds) > 8 else "")
    content = {
        "date": meta.date,
        "commit": meta.commit,
        "hardware": meta.hardware,
        "seeds": f"{len(meta.seeds)}: {seeds}",
        **meta.versions,
    }
    return facts(content)
